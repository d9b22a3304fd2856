//! The first words of a TLS connection, as far as they say who is meant. Reads nothing that is secret, and breaks nothing open (RFC 8446, section 4.1.2; RFC 6066, section 3).
//!
//! A name that is allowed and one that is not are often at the same address, of a provider that tells them apart by the name in these words.

/// Longest first words that are waited for, in bytes.
pub const MAX_HELLO: usize = 64 * 1024;

/// Bytes before what a record holds.
const RECORD_HEAD: usize = 5;
const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: u8 = 1;
const SERVER_NAME: u16 = 0;

/// What the beginning of a connection says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Look {
    /// It is not TLS.
    NotTls,
    /// More is needed to tell.
    More,
    /// It is for the server of this name, as it is written.
    Name(String),
    /// It is TLS and names nobody.
    NoName,
    /// It begins like TLS, and can't be read.
    Wrong,
}

/// A client's first words, as they come. Each byte is looked at once, in however small pieces it comes.
#[derive(Debug, Default)]
pub struct FirstWords {
    /// Bytes that have come.
    came: usize,
    /// Head of the record that has begun, as far as it is there.
    head: Vec<u8>,
    /// Bytes of the record that are still to come.
    left: usize,
    /// The first handshake message, put together from its records.
    message: Vec<u8>,
}

impl FirstWords {
    /// Looks at the next piece of what a client sends. Once it has told something else than [`Look::More`], there is nothing more to look at.
    #[must_use]
    pub fn look(&mut self, piece: &[u8]) -> Look {
        if self.came == 0 && piece.first().is_some_and(|first| *first != HANDSHAKE) {
            return Look::NotTls;
        }
        self.came += piece.len();
        match self.take(piece) {
            Some(true) => self.message.get(4..).and_then(server_name).unwrap_or(Look::Wrong),
            Some(false) if self.came < MAX_HELLO => Look::More,
            _ => Look::Wrong,
        }
    }

    /// Whether the first message is all there; nothing where it can't be one.
    fn take(&mut self, mut piece: &[u8]) -> Option<bool> {
        while !piece.is_empty() {
            if self.left == 0 {
                let (head, rest) = piece.split_at(piece.len().min(RECORD_HEAD - self.head.len()));
                self.head.extend_from_slice(head);
                piece = rest;
                if self.head.len() == RECORD_HEAD {
                    self.left = length_of_record(&self.head)?;
                    self.head.clear();
                }
                continue;
            }
            let (part, rest) = piece.split_at(piece.len().min(self.left));
            self.message.extend_from_slice(part);
            self.left -= part.len();
            piece = rest;
            if self.message.first().is_some_and(|kind| *kind != CLIENT_HELLO) {
                return None;
            }
            if let Some(&[_, a, b, c]) = self.message.first_chunk::<4>() {
                let wanted = 4 + usize::from(a) * 65_536 + usize::from(b) * 256 + usize::from(c);
                if self.message.len() >= wanted {
                    self.message.truncate(wanted);
                    return Some(true);
                }
            }
        }
        Some(false)
    }
}

fn length_of_record(head: &[u8]) -> Option<usize> {
    let &[kind, major, _, a, b] = head else { return None };
    let length = usize::from(u16::from_be_bytes([a, b]));
    (kind == HANDSHAKE && major == 3 && (1..=16 * 1024).contains(&length)).then_some(length)
}

/// The one server that a hello names; nothing where it can't be read.
fn server_name(hello: &[u8]) -> Option<Look> {
    let mut rest = Reader(hello);
    // Version and random.
    rest.take(2 + 32)?;
    let session = rest.number(1)?;
    rest.take(session)?;
    let ciphers = rest.number(2)?;
    rest.take(ciphers)?;
    let compressions = rest.number(1)?;
    rest.take(compressions)?;
    if rest.0.is_empty() {
        return Some(Look::NoName);
    }
    let length = rest.number(2)?;
    let mut extensions = Reader(rest.take(length)?);
    let mut found = Look::NoName;
    while !extensions.0.is_empty() {
        let kind = extensions.number(2)?;
        let length = extensions.number(2)?;
        let body = extensions.take(length)?;
        if kind == usize::from(SERVER_NAME) {
            // Two of them could be read in two ways.
            if found != Look::NoName {
                return None;
            }
            found = Look::Name(the_name(body)?);
        }
    }
    rest.0.is_empty().then_some(found)
}

fn the_name(body: &[u8]) -> Option<String> {
    let mut list = Reader(body);
    let length = list.number(2)?;
    let is_host = list.0.len() == length && list.number(1)? == 0;
    let length = list.number(2)?;
    let name = list.take(length)?;
    let is_all = is_host && list.0.is_empty() && name.is_ascii() && !name.is_empty();
    is_all.then(|| String::from_utf8_lossy(name).into_owned())
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    /// A number of one or two bytes.
    fn number(&mut self, bytes: usize) -> Option<usize> {
        Some(self.take(bytes)?.iter().fold(0, |number, byte| number * 256 + usize::from(*byte)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn look(sent: &[u8]) -> Look {
        FirstWords::default().look(sent)
    }

    fn hello(names: &[&str]) -> Vec<u8> {
        let two = |n: usize| (n as u16).to_be_bytes();
        let mut extensions = vec![0, 43, 0, 3, 2, 3, 4];
        for name in names {
            extensions.extend([0, 0]);
            extensions.extend(two(name.len() + 5));
            extensions.extend(two(name.len() + 3));
            extensions.push(0);
            extensions.extend(two(name.len()));
            extensions.extend(name.as_bytes());
        }
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.extend([2, 1, 2, 0, 2, 0x13, 1, 1, 0]);
        body.extend(two(extensions.len()));
        body.extend(extensions);
        let mut message = vec![CLIENT_HELLO, 0];
        message.extend(two(body.len()));
        message.extend(body);
        message
    }

    fn records(message: &[u8], size: usize) -> Vec<u8> {
        let mut sent = Vec::new();
        for part in message.chunks(size) {
            sent.extend([HANDSHAKE, 3, 1]);
            sent.extend((part.len() as u16).to_be_bytes());
            sent.extend(part);
        }
        sent
    }

    #[test]
    fn the_name_is_read_and_what_has_two_is_not() {
        assert_eq!(look(&records(&hello(&["example.org"]), 10_000)), Look::Name("example.org".to_owned()));
        assert_eq!(look(&records(&hello(&[]), 10_000)), Look::NoName);
        assert_eq!(look(&records(&hello(&["a.org", "b.org"]), 10_000)), Look::Wrong);
        assert_eq!(look(b"GET / HTTP/1.1\r\n"), Look::NotTls);
        assert_eq!(look(b"SSH-2.0-x\r\n"), Look::NotTls);
        assert_eq!(look(&[HANDSHAKE, 3, 1, 0, 4, 2, 0, 0, 0]), Look::Wrong);
        assert_eq!(look(&[HANDSHAKE, 9, 9, 9, 9]), Look::Wrong);
        assert_eq!(look(&[]), Look::More);
    }

    #[test]
    fn words_that_come_byte_by_byte_cost_no_more_than_their_length() {
        // A message that says it has 60 KiB, in records of one byte each.
        let sent = records(&[&[CLIENT_HELLO, 0, 0xf0, 0][..], &[0; 10_500]].concat(), 1);
        assert!((60_000..MAX_HELLO).contains(&sent.len()));
        let began = std::time::Instant::now();
        let mut words = FirstWords::default();
        assert!(sent.iter().all(|byte| words.look(&[*byte]) == Look::More));
        // What looks at all of it again with each byte takes a hundred times as long.
        assert!(began.elapsed() < std::time::Duration::from_secs(2), "{:?}", began.elapsed());
    }

    proptest! {
        #[test]
        fn in_whatever_pieces_it_comes_it_says_the_same(size in 1_usize..400, step in 1_usize..50) {
            let sent = records(&hello(&["example.org"]), size);
            let mut words = FirstWords::default();
            let last = sent.chunks(step).map(|piece| words.look(piece)).find(|look| *look != Look::More);
            prop_assert_eq!(last, Some(Look::Name("example.org".to_owned())));
        }

        #[test]
        fn however_it_is_cut_it_is_read_once_it_is_there(size in 1_usize..400, cut in 0_usize..2000) {
            let sent = records(&hello(&["example.org"]), size);
            prop_assert_eq!(look(&sent), Look::Name("example.org".to_owned()));
            if cut < sent.len() {
                let early = look(&sent[..cut]);
                prop_assert!(early == Look::More, "{:?}", early);
            }
        }

        #[test]
        fn no_bytes_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..300), at in 0_usize..200, byte: u8) {
            let _ = look(&bytes);
            bytes.insert(0, HANDSHAKE);
            let _ = look(&bytes);
            let mut sent = records(&hello(&["example.org"]), 10_000);
            let length = sent.len();
            sent[at % length] = byte;
            let _ = look(&sent);
        }
    }
}
