//! The reset marker: 48 bytes that drop whatever was said on a byte stream and begin a new connection on it.
//!
//! A control plane writes one (magic, the link's secret, a fresh nonce) at any instant; the guest drops its connection and
//! answers with the same 48 bytes. Only that echo counts, and everything before it is discarded.

use memchr::memmem;

/// Length of a marker in bytes.
pub const MARKER_LEN: usize = 48;

/// The constant first bytes of every marker.
pub const MAGIC: [u8; 16] =
    [0xce, 0x11, 0xb1, 0x0c, 0x00, 0xff, 0x5a, 0xa5, 0x9d, 0x3e, 0x71, 0xc4, 0x28, 0xf6, 0x0b, 0xd7];

/// The secret that a control plane gives a guest with its first marker, and repeats in every later one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct LinkSecret(pub [u8; 16]);

impl std::fmt::Debug for LinkSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LinkSecret(…)")
    }
}

/// A reset marker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marker {
    /// Proves that the sender is the guest's own control plane.
    pub secret: LinkSecret,
    /// Fresh for every reset, so that an old echo is never taken for the new one.
    pub nonce: [u8; 16],
}

impl Marker {
    /// The bytes on the stream.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; MARKER_LEN] {
        let mut bytes = [0; MARKER_LEN];
        bytes[..16].copy_from_slice(&MAGIC);
        bytes[16..32].copy_from_slice(&self.secret.0);
        bytes[32..].copy_from_slice(&self.nonce);
        bytes
    }

    fn from_bytes(bytes: &[u8; MARKER_LEN]) -> Self {
        let part = |from: usize| {
            let mut part = [0; 16];
            part.copy_from_slice(&bytes[from..from + 16]);
            part
        };
        Self { secret: LinkSecret(part(16)), nonce: part(32) }
    }
}

/// Finds markers in a byte stream, across the boundaries of reads.
///
/// Bytes that are certainly no part of a marker are handed out at once; at most [`MARKER_LEN`]` - 1` are held back.
#[derive(Debug, Default)]
pub struct MarkerScanner {
    held: Vec<u8>,
    /// How many of the held bytes were handed out by [`MarkerScanner::release`] already.
    released: usize,
}

/// One piece of a scanned stream, in order.
#[derive(Debug, PartialEq, Eq)]
pub enum Scanned {
    /// Bytes that belong to the connection.
    Bytes(Vec<u8>),
    /// A marker. The scanner does not judge its secret.
    Marker(Marker),
}

impl MarkerScanner {
    /// What is held back because it may yet become a marker.
    #[must_use]
    pub fn held(&self) -> &[u8] {
        &self.held
    }

    /// Takes what was read and returns the pieces that are decided, in order.
    ///
    /// `accepts` judges a candidate (its secret, or its nonce); 48 bytes that only look like a marker stay bytes.
    pub fn push(&mut self, read: &[u8], accepts: impl Fn(&Marker) -> bool) -> Vec<Scanned> {
        let mut pieces = Vec::new();
        // Nearly always: whole pieces of a file, in which nothing looks like a marker, are copied once.
        if self.held.is_empty() && find_magic_prefix(read, 0).is_none() {
            push_bytes(&mut pieces, read);
            return pieces;
        }
        self.held.extend_from_slice(read);
        let mut start = 0;
        let mut at = 0;
        while let Some(candidate) = find_magic_prefix(&self.held, at) {
            let Some(bytes) = self.held[candidate..].first_chunk::<MARKER_LEN>() else {
                push_bytes(&mut pieces, self.unreleased(start, candidate));
                self.held.drain(..candidate);
                self.released = self.released.saturating_sub(candidate);
                return pieces;
            };
            let marker = Marker::from_bytes(bytes);
            if accepts(&marker) {
                push_bytes(&mut pieces, self.unreleased(start, candidate));
                pieces.push(Scanned::Marker(marker));
                start = candidate + MARKER_LEN;
                at = start;
            } else {
                at = candidate + 1;
            }
        }
        push_bytes(&mut pieces, self.unreleased(start, self.held.len()));
        self.held.clear();
        self.released = 0;
        pieces
    }

    /// Whether bytes are held back that [`MarkerScanner::release`] would hand out.
    #[must_use]
    pub fn is_holding(&self) -> bool {
        self.released < self.held.len()
    }

    /// Hands out what is held back, for it may be the end of a request that just looks like the beginning of a marker.
    ///
    /// If the rest of a marker follows nevertheless, it is found: what was handed out then went to a connection that is dropped.
    pub fn release(&mut self) -> Vec<u8> {
        let bytes = self.held[self.released..].to_vec();
        self.released = self.held.len();
        bytes
    }

    fn unreleased(&self, from: usize, to: usize) -> &[u8] {
        &self.held[from.max(self.released).min(to)..to]
    }
}

fn push_bytes(pieces: &mut Vec<Scanned>, bytes: &[u8]) {
    if !bytes.is_empty() {
        pieces.push(Scanned::Bytes(bytes.to_vec()));
    }
}

/// The first place at or after `from` where the magic stands, or could still be completed by bytes not yet read.
fn find_magic_prefix(bytes: &[u8], from: usize) -> Option<usize> {
    let rest = bytes.get(from..)?;
    let begun = || {
        let last = rest.len().saturating_sub(MAGIC.len() - 1);
        (last..rest.len()).find(|at| MAGIC.starts_with(&rest[*at..]))
    };
    memmem::find(rest, &MAGIC).or_else(begun).map(|at| from + at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECRET: LinkSecret = LinkSecret([7; 16]);

    fn scan(chunks: &[Vec<u8>]) -> (Vec<u8>, Vec<Marker>) {
        let mut scanner = MarkerScanner::default();
        let (mut bytes, mut markers) = (Vec::new(), Vec::new());
        for chunk in chunks {
            for piece in scanner.push(chunk, |m| m.secret == SECRET) {
                match piece {
                    Scanned::Bytes(b) => bytes.extend(b),
                    Scanned::Marker(m) => markers.push(m),
                }
            }
        }
        bytes.extend(&scanner.held);
        (bytes, markers)
    }

    #[test]
    fn a_marker_with_another_secret_stays_bytes() {
        let stranger = Marker { secret: LinkSecret([8; 16]), nonce: [1; 16] }.to_bytes().to_vec();
        assert_eq!(scan(std::slice::from_ref(&stranger)), (stranger.clone(), vec![]));
    }

    #[test]
    fn what_only_looks_like_a_beginning_can_be_released() {
        let mut scanner = MarkerScanner::default();
        assert_eq!(scanner.push(&[1, MAGIC[0]], |_| true), [Scanned::Bytes(vec![1])]);
        assert!(scanner.is_holding());
        assert_eq!(scanner.release(), [MAGIC[0]]);
        assert!(!scanner.is_holding());
        assert_eq!(scanner.push(&[2, 3], |_| true), [Scanned::Bytes(vec![2, 3])]);
        let marker = Marker { secret: SECRET, nonce: [1; 16] };
        let bytes = marker.to_bytes();
        assert_eq!(scanner.push(&bytes[..20], |_| true), []);
        assert_eq!(scanner.release(), bytes[..20]);
        assert_eq!(scanner.push(&bytes[20..], |_| true), [Scanned::Marker(marker)]);
    }

    proptest! {
        #[test]
        fn markers_are_found_across_any_read_boundaries(
            before in proptest::collection::vec(prop_oneof![any::<u8>(), Just(MAGIC[0]), Just(MAGIC[1])], 0..200),
            after in proptest::collection::vec(any::<u8>(), 0..200),
            nonce in any::<[u8; 16]>(),
            sizes in proptest::collection::vec(1usize..60, 1..40),
        ) {
            let marker = Marker { secret: SECRET, nonce };
            let mut stream = before.clone();
            stream.extend(marker.to_bytes());
            stream.extend(&after);
            let mut chunks = Vec::new();
            let mut rest = stream.as_slice();
            for size in sizes.iter().cycle() {
                if rest.is_empty() { break; }
                let (chunk, tail) = rest.split_at((*size).min(rest.len()));
                chunks.push(chunk.to_vec());
                rest = tail;
            }
            let (bytes, markers) = scan(&chunks);
            prop_assert_eq!(markers, vec![marker]);
            prop_assert_eq!(bytes, [before, after].concat());
        }
    }
}
