//! Bodies that are compressed with gzip, as they come: uploads are inflated, downloads are compressed for who asks for that alone. Holds a piece at a time.

use std::collections::VecDeque;
use std::io::{self, Write};

use axum::body::Bytes;
use axum::http::{HeaderMap, header};
use flate2::Compression;
use flate2::write::{GzDecoder, GzEncoder};
use futures_util::stream::{self, Stream, StreamExt};

/// So much is inflated at once: it becomes a thousand times as much at most.
const STEP: usize = 1024;

/// Whether a body is compressed.
///
/// # Errors
/// A sentence, when it is in another way than this.
pub(super) fn is_on(headers: &HeaderMap) -> Result<bool, String> {
    match headers.get(header::CONTENT_ENCODING).map(|value| value.to_str().unwrap_or_default().trim()) {
        None | Some("" | "identity") => Ok(false),
        Some(value) if value.eq_ignore_ascii_case("gzip") => Ok(true),
        Some(other) => Err(format!("Content-Encoding is {other:.40?}; allowed are gzip and identity")),
    }
}

/// Whether somebody wants gzip and nothing else. HTTP libraries that take it among others ask for it always, and it would cost both sides more than it gives them.
pub(super) fn is_wanted(headers: &HeaderMap) -> bool {
    let asked = headers.get(header::ACCEPT_ENCODING).and_then(|value| value.to_str().ok());
    asked.is_some_and(|asked| asked.trim().eq_ignore_ascii_case("gzip"))
}

/// What a compressed body holds. One that is none, or ends within, ends with an error.
pub(super) fn inflated<S, E>(source: S) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static
where
    S: Stream<Item = Result<Bytes, E>> + Send + 'static,
    E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
{
    let state = (source.boxed(), Some(GzDecoder::new(Vec::new())), Bytes::new());
    stream::unfold(state, |(mut source, mut decoder, mut rest)| async move {
        loop {
            let inflating = decoder.as_mut()?;
            let outcome = if rest.is_empty() {
                match source.next().await {
                    Some(Ok(piece)) => {
                        rest = piece;
                        continue;
                    }
                    Some(Err(error)) => Err(io::Error::other(error)),
                    None => {
                        let last = decoder.take()?.finish().map(Bytes::from);
                        return match last {
                            Ok(last) if last.is_empty() => None,
                            last => Some((last, (source, None, rest))),
                        };
                    }
                }
            } else {
                let step = rest.split_to(rest.len().min(STEP));
                inflating.write_all(&step).map(|()| Bytes::from(std::mem::take(inflating.get_mut())))
            };
            match outcome {
                Ok(piece) if piece.is_empty() => {}
                Ok(piece) => return Some((Ok(piece), (source, decoder, rest))),
                Err(error) => return Some((Err(error), (source, None, rest))),
            }
        }
    })
}

/// A body, compressed.
pub(super) fn deflated<S>(source: S) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static
where
    S: Stream<Item = io::Result<Bytes>> + Send + 'static,
{
    let state = (source.boxed(), Some(GzEncoder::new(Vec::new(), Compression::fast())), VecDeque::new());
    stream::unfold(state, |(mut source, mut encoder, mut ready): (_, _, VecDeque<io::Result<Bytes>>)| async move {
        loop {
            if let Some(piece) = ready.pop_front() {
                return Some((piece, (source, encoder, ready)));
            }
            let deflating: &mut GzEncoder<Vec<u8>> = encoder.as_mut()?;
            match source.next().await {
                Some(Ok(piece)) => {
                    let wrote = deflating.write_all(&piece).map(|()| Bytes::from(std::mem::take(deflating.get_mut())));
                    if wrote.as_ref().map_or(true, |bytes| !bytes.is_empty()) {
                        ready.push_back(wrote);
                    }
                }
                Some(Err(error)) => {
                    encoder = None;
                    ready.push_back(Err(error));
                }
                None => ready.push_back(encoder.take()?.finish().map(Bytes::from)),
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(of: &[u8], size: usize) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static + use<> {
        stream::iter(of.chunks(size).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect::<Vec<_>>())
    }

    async fn whole(source: impl Stream<Item = io::Result<Bytes>>) -> io::Result<Vec<u8>> {
        let all: Vec<_> = source.collect().await;
        all.into_iter().try_fold(Vec::new(), |whole, piece| Ok([whole, piece?.to_vec()].concat()))
    }

    #[tokio::test]
    async fn what_is_compressed_comes_back() {
        let text: Vec<u8> = (0..300_000_u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
        for size in [1, 700, 70_000] {
            let text = if size == 1 { &text[..2000] } else { &text };
            let compressed = whole(deflated(pieces(text, 10_000))).await.unwrap();
            assert!(compressed.len() < text.len());
            assert!(whole(inflated(pieces(&compressed, size))).await.unwrap() == text);
        }
        assert_eq!(whole(inflated(deflated(pieces(b"", 1)))).await.unwrap(), b"");
    }

    #[tokio::test]
    async fn what_is_cut_off_or_none_is_an_error() {
        let compressed = whole(deflated(pieces(&[7; 5000], 500))).await.unwrap();
        for cut in [0, 5, compressed.len() / 2, compressed.len() - 1] {
            assert!(whole(inflated(pieces(&compressed[..cut], 100))).await.is_err(), "{cut}");
        }
        assert!(whole(inflated(pieces(b"this is no gzip, but long enough", 100))).await.is_err());
    }

    #[tokio::test]
    async fn little_that_becomes_much_comes_in_pieces() {
        let compressed = whole(deflated(pieces(&vec![0; 50_000_000], 1_000_000))).await.unwrap();
        let mut most = 0;
        let mut inflating = Box::pin(inflated(pieces(&compressed, 100_000)));
        while let Some(piece) = inflating.next().await {
            most = most.max(piece.unwrap().len());
        }
        assert!(most < 2 * 1024 * STEP, "{most}");
    }

    #[test]
    fn encodings_are_known_ones() {
        let headers = |value: &'static str| HeaderMap::from_iter([(header::CONTENT_ENCODING, value.parse().unwrap())]);
        assert_eq!(is_on(&HeaderMap::new()), Ok(false));
        assert_eq!((is_on(&headers("identity")), is_on(&headers("GZIP"))), (Ok(false), Ok(true)));
        assert!(is_on(&headers("br")).is_err() && is_on(&headers("gzip, gzip")).is_err());
        let wants =
            |value: &'static str| is_wanted(&HeaderMap::from_iter([(header::ACCEPT_ENCODING, value.parse().unwrap())]));
        assert!(wants("gzip") && !wants("gzip, deflate") && !wants("br") && !is_wanted(&HeaderMap::new()));
    }
}
