//! A frame: a small JSON head and any number of opaque parts, with a length before each.
//!
//! Used wherever bytes of a kernel travel: a Jupyter message's parts stay as they came.
//! Layout, all numbers big-endian `u32`: `length of the rest | length of the head | head | (length of a part | part)*`.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use serde::{Serialize, de::DeserializeOwned};

/// Longest frame either side accepts, in bytes, its own length field not counted.
pub const MAX_FRAME: usize = 24 * 1024 * 1024;
/// Longest JSON head, in bytes.
pub const MAX_HEAD: usize = 256 * 1024;
/// Most parts a frame may have.
pub const MAX_PARTS: usize = 72;

/// A frame with its head already decoded.
#[derive(Debug, Clone, PartialEq)]
pub struct Frame<H> {
    /// What the frame is.
    pub head: H,
    /// Opaque bytes that belong to it.
    pub parts: Vec<Bytes>,
}

/// Why bytes are no frame. The stream they came from can't be read any further.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// A declared length is above the limit, or the parts don't fill the frame exactly.
    #[error("a frame of the link is malformed: {0}")]
    Malformed(&'static str),
    /// The head is not the JSON that was expected.
    #[error("the head of a frame of the link is not understood: {0}")]
    Head(#[from] serde_json::Error),
}

/// Appends one frame to `out`.
///
/// # Errors
/// When the head can't be written as JSON or the frame would be above [`MAX_FRAME`].
pub fn encode<H: Serialize>(head: &H, parts: &[Bytes], out: &mut BytesMut) -> Result<(), FrameError> {
    let head = serde_json::to_vec(head)?;
    let length = 4 + head.len() + parts.iter().map(|p| 4 + p.len()).sum::<usize>();
    if length > MAX_FRAME || head.len() > MAX_HEAD || parts.len() > MAX_PARTS {
        return Err(FrameError::Malformed("larger than the link allows"));
    }
    out.reserve(4 + length);
    out.put_u32(length as u32);
    out.put_u32(head.len() as u32);
    out.put_slice(&head);
    for part in parts {
        out.put_u32(part.len() as u32);
        out.put_slice(part);
    }
    Ok(())
}

/// Cuts a byte stream into frames. Holds at most one unfinished frame of at most [`MAX_FRAME`] bytes.
#[derive(Debug)]
pub struct Decoder {
    buffer: BytesMut,
    limit: usize,
}

impl Default for Decoder {
    fn default() -> Self {
        Self::limited(MAX_FRAME)
    }
}

impl Decoder {
    /// One of frames that are no longer than so many bytes, of which no more are held.
    #[must_use]
    pub fn limited(limit: usize) -> Self {
        Self { buffer: BytesMut::new(), limit: limit.min(MAX_FRAME) }
    }

    /// Takes bytes as they were read.
    pub fn push(&mut self, read: &[u8]) {
        self.buffer.extend_from_slice(read);
    }

    /// The next whole frame, if there is one.
    ///
    /// # Errors
    /// On bytes that are no frame; the decoder is of no further use then.
    pub fn next_frame<H: DeserializeOwned>(&mut self) -> Result<Option<Frame<H>>, FrameError> {
        let Some(length) = self.buffer.first_chunk::<4>().map(|b| u32::from_be_bytes(*b) as usize) else {
            return Ok(None);
        };
        if length > self.limit {
            return Err(FrameError::Malformed("declared longer than the link allows"));
        }
        if self.buffer.len() < 4 + length {
            return Ok(None);
        }
        self.buffer.advance(4);
        decode_body(self.buffer.split_to(length).freeze()).map(Some)
    }

    /// Whether bytes of an unfinished frame are held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }
}

fn decode_body<H: DeserializeOwned>(mut body: Bytes) -> Result<Frame<H>, FrameError> {
    let head = take(&mut body, MAX_HEAD)?;
    let mut parts = Vec::new();
    while body.has_remaining() {
        if parts.len() == MAX_PARTS {
            return Err(FrameError::Malformed("too many parts"));
        }
        parts.push(take(&mut body, MAX_FRAME)?);
    }
    Ok(Frame { head: serde_json::from_slice(&head)?, parts })
}

fn take(body: &mut Bytes, limit: usize) -> Result<Bytes, FrameError> {
    if body.remaining() < 4 {
        return Err(FrameError::Malformed("ends inside a length"));
    }
    let length = body.get_u32() as usize;
    if length > limit || length > body.remaining() {
        return Err(FrameError::Malformed("a part is longer than its frame"));
    }
    Ok(body.split_to(length))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn frames_survive_any_cut(
            heads in proptest::collection::vec((any::<u32>(), proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 0..6)), 1..5),
            step in 1usize..97,
        ) {
            let mut stream = BytesMut::new();
            for (head, parts) in &heads {
                let parts: Vec<Bytes> = parts.iter().cloned().map(Bytes::from).collect();
                encode(head, &parts, &mut stream).unwrap();
            }
            let mut decoder = Decoder::default();
            let mut seen = Vec::new();
            for chunk in stream.chunks(step) {
                decoder.push(chunk);
                while let Some(frame) = decoder.next_frame::<u32>().unwrap() {
                    seen.push((frame.head, frame.parts.iter().map(|p| p.to_vec()).collect::<Vec<_>>()));
                }
            }
            prop_assert_eq!(seen, heads);
            prop_assert!(decoder.is_empty());
        }

        #[test]
        fn no_bytes_make_the_decoder_panic_or_reserve(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let mut decoder = Decoder::default();
            decoder.push(&bytes);
            while let Ok(Some(_)) = decoder.next_frame::<serde_json::Value>() {}
            prop_assert!(decoder.buffer.capacity() < 4096);
        }
    }
}
