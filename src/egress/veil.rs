//! Takes secrets out of what passes: each byte of one becomes a star, so that lengths stay. Holds back no more than what may be the beginning of one by its length.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Bytes, BytesMut};
use hyper::body::{Body, Frame, Incoming, SizeHint};

/// Shorter texts are no secrets that could be told from others.
const SHORTEST: usize = 6;

/// What is not to be seen.
pub(super) struct Secrets(Vec<Vec<u8>>);

impl Secrets {
    /// Those of a header's value: all of it, and what follows a scheme such as `Bearer`.
    pub(super) fn of(value: &[u8]) -> Self {
        let last = value.rsplit(|byte| *byte == b' ').next().unwrap_or_default();
        let mut secrets = vec![value.to_vec()];
        if last.len() < value.len() {
            secrets.push(last.to_vec());
        }
        // The longer ones first, which hold the others.
        Self(secrets.into_iter().filter(|secret| secret.len() >= SHORTEST).collect())
    }

    /// Whether one is in a text.
    pub(super) fn are_in(&self, text: &[u8]) -> bool {
        self.0.iter().any(|secret| text.windows(secret.len()).any(|window| window == secret))
    }

    fn cover(&self, text: &mut [u8]) {
        for secret in &self.0 {
            let mut at = 0;
            while let Some(found) = text[at..].windows(secret.len()).position(|window| window == secret) {
                text[at + found..at + found + secret.len()].fill(b'*');
                at += found + secret.len();
            }
        }
    }

    /// How many bytes at the end of a text may be the beginning of one. It follows from their lengths and from what a header's value may hold, never from what they are: code
    /// that has its own words sent back would learn of a right guess by where they are cut.
    fn pending(&self, text: &[u8]) -> usize {
        let longest = self.0.iter().map(Vec::len).max().unwrap_or(0).saturating_sub(1);
        text.iter().rev().take(longest).take_while(|byte| !byte.is_ascii_control() || **byte == b'\t').count()
    }
}

/// A body without secrets in it.
pub(super) struct Veiled {
    body: Incoming,
    secrets: Arc<Secrets>,
    held: BytesMut,
}

impl Veiled {
    pub(super) fn new(body: Incoming, secrets: Arc<Secrets>) -> Self {
        Self { body, secrets, held: BytesMut::new() }
    }
}

/// What may be told of what was held and what has come; the rest is held.
fn tell(secrets: &Secrets, held: &mut BytesMut, data: &[u8]) -> Bytes {
    held.extend_from_slice(data);
    secrets.cover(held);
    let keep = secrets.pending(held);
    held.split_to(held.len() - keep).freeze()
}

impl Body for Veiled {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = self.get_mut();
        loop {
            match std::task::ready!(Pin::new(&mut this.body).poll_frame(cx)) {
                Some(Ok(frame)) => {
                    // Trailers are left out: nobody has looked at them.
                    let Ok(data) = frame.into_data() else { continue };
                    let told = tell(&this.secrets, &mut this.held, &data);
                    if !told.is_empty() {
                        return Poll::Ready(Some(Ok(Frame::data(told))));
                    }
                }
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                None if this.held.is_empty() => return Poll::Ready(None),
                None => return Poll::Ready(Some(Ok(Frame::data(this.held.split().freeze())))),
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.held.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let hint = self.body.size_hint();
        match hint.exact() {
            Some(exact) => SizeHint::with_exact(exact + self.held.len() as u64),
            None => SizeHint::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_secret_is_covered_with_and_without_its_scheme() {
        let secrets = Secrets::of(b"Bearer s3cret-token");
        let mut text = b"a Bearer s3cret-token b s3cret-token c Bearer".to_vec();
        secrets.cover(&mut text);
        assert_eq!(text, b"a ******************* b ************ c Bearer");
        assert!(!secrets.are_in(&text));
    }

    #[test]
    fn where_a_text_is_cut_tells_nothing_of_a_guess() {
        let secrets = Secrets::of(b"Bearer s3cret-token");
        let told = |text: &[u8]| tell(&secrets, &mut BytesMut::new(), text).len();
        assert_eq!(told(b"a long line of text that ends in s3c"), told(b"a long line of text that ends in xyz"));
        assert_eq!(told(b"data: s3c\n"), 10, "a line that has ended is told at once");
    }

    proptest! {
        #[test]
        fn however_it_is_cut_no_secret_comes_through(
            text in "(s3s3cr|s3cr|et|s3cret-token|Bearer |x){0,40}", cuts in proptest::collection::vec(1_usize..9, 0..80),
        ) {
            let secrets = Secrets::of(b"Bearer s3cret-token");
            let (mut held, mut told, mut rest) = (BytesMut::new(), Vec::new(), text.as_bytes());
            for cut in cuts.into_iter().chain(std::iter::repeat(7)) {
                if rest.is_empty() { break; }
                let (piece, after) = rest.split_at(cut.min(rest.len()));
                told.extend_from_slice(&tell(&secrets, &mut held, piece));
                rest = after;
            }
            told.extend_from_slice(&held);
            prop_assert_eq!(told.len(), text.len());
            prop_assert!(!secrets.are_in(&told));
            let kept = text.as_bytes().iter().zip(&told).all(|(before, after)| before == after || *after == b'*');
            prop_assert!(kept);
        }
    }
}
