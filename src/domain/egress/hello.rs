//! The first words of a TLS connection, as far as they say who is meant. Reads nothing that is secret, and breaks nothing open (RFC 8446, section 4.1.2; RFC 6066, section 3).
//!
//! A name that is allowed and one that is not are often at the same address, of a provider that tells them apart by the name in these words.

/// Longest first words that are waited for, in bytes.
pub const MAX_HELLO: usize = 64 * 1024;

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

/// Looks at the beginning of what a client sends.
#[must_use]
pub fn look(sent: &[u8]) -> Look {
    match sent.first() {
        None => return Look::More,
        Some(&HANDSHAKE) => {}
        Some(_) => return Look::NotTls,
    }
    match client_hello(sent) {
        Ok(Some(hello)) => server_name(&hello).unwrap_or(Look::Wrong),
        Ok(None) if sent.len() < MAX_HELLO => Look::More,
        _ => Look::Wrong,
    }
}

/// The body of the first handshake message, put together from its records; nothing while it is not all there.
fn client_hello(mut sent: &[u8]) -> Result<Option<Vec<u8>>, ()> {
    let mut message = Vec::new();
    while let Some((head, rest)) = sent.split_at_checked(5) {
        let length = usize::from(u16::from_be_bytes([head[3], head[4]]));
        if head[0] != HANDSHAKE || head[1] != 3 || length == 0 || length > 16 * 1024 {
            return Err(());
        }
        let part = &rest[..length.min(rest.len())];
        message.extend_from_slice(part);
        if message.first().is_some_and(|kind| *kind != CLIENT_HELLO) {
            return Err(());
        }
        if let Some(&[_, a, b, c]) = message.first_chunk::<4>() {
            let wanted = 4 + usize::from(a) * 65_536 + usize::from(b) * 256 + usize::from(c);
            if message.len() >= wanted {
                message.truncate(wanted);
                return Ok(Some(message.split_off(4)));
            }
        }
        sent = &rest[part.len()..];
    }
    Ok(None)
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

    proptest! {
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
