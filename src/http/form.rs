//! Files that come as a form (`multipart/form-data`), one after the other, each written as it comes. Where each belongs is told by whoever reads the form.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use axum::body::Bytes;
use axum::http::{HeaderMap, header};
use futures_util::stream::{BoxStream, Stream, StreamExt};
use multer::{Field, Multipart};

use super::App;
use super::problem::{self, Problem};
use crate::domain::ids::SessionId;
use crate::service::files::{FileWritten, WriteFile};
use crate::service::keys::Principal;
use crate::service::transfer::STALLED;

/// Files of one form.
const MAX_FILES: usize = 1000;
/// Bytes of a form's heads, and of what is read before it is taken.
const MAX_UNTAKEN: usize = 1024 * 1024;

/// A form that is being read.
pub(super) struct Form {
    form: Multipart<'static>,
    untaken: Arc<AtomicUsize>,
    count: usize,
}

impl Form {
    /// The one that a request brings.
    ///
    /// # Errors
    /// When it is no form.
    pub(super) fn open<E>(
        headers: &HeaderMap,
        source: impl Stream<Item = Result<Bytes, E>> + Send + 'static,
    ) -> Result<Self, Problem>
    where
        E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
    {
        let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        let boundary = multer::parse_boundary(kind).map_err(|_| {
            Problem::new(problem::UNSUPPORTED_MEDIA_TYPE, "send a form as multipart/form-data, or one file as it is")
        })?;
        let untaken = Arc::new(AtomicUsize::new(0));
        let source = source.map(|piece| piece.map_err(std::io::Error::other)).boxed();
        let source = Sparing { source, untaken: Arc::clone(&untaken), rests: false };
        Ok(Self { form: Multipart::new(source, boundary), untaken, count: 0 })
    }

    /// The next part.
    ///
    /// # Errors
    /// When it comes too slowly, is one too many, or none.
    pub(super) async fn next(&mut self) -> Result<Option<Field<'static>>, Problem> {
        let next = tokio::time::timeout(STALLED, self.form.next_field()).await;
        let Some(field) = next.map_err(|_| stalled())?.map_err(|error| broken(&error))? else { return Ok(None) };
        self.untaken.store(0, Ordering::Relaxed);
        if self.count == MAX_FILES {
            return Err(Problem::new(problem::INVALID_REQUEST, format!("a form may have {MAX_FILES} files")));
        }
        self.count += 1;
        Ok(Some(field))
    }

    /// The next bytes of a part.
    ///
    /// # Errors
    /// When they come too slowly, or break off.
    pub(super) async fn piece(&self, field: &mut Field<'static>) -> Result<Option<Bytes>, Problem> {
        let piece = tokio::time::timeout(STALLED, field.chunk()).await.map_err(|_| stalled())?;
        self.untaken.store(0, Ordering::Relaxed);
        piece.map_err(|error| broken(&error))
    }

    /// Writes one file. Its pieces are handed over, since the form itself lives only here.
    ///
    /// # Errors
    /// When it can't be written, or breaks off.
    pub(super) async fn write(
        &self,
        app: &App,
        (who, id): (&Principal, SessionId),
        asked: WriteFile,
        mut field: Field<'static>,
    ) -> Result<FileWritten, Problem> {
        let (pieces, source) = tokio::sync::mpsc::channel::<Result<Bytes, ()>>(1);
        let source = tokio_stream::wrappers::ReceiverStream::new(source);
        let reading = async {
            loop {
                let piece = match self.piece(&mut field).await {
                    Ok(Some(piece)) => piece,
                    Ok(None) => {
                        drop(pieces);
                        return None;
                    }
                    Err(problem) => {
                        // It is not whole.
                        let _ = pieces.send(Err(())).await;
                        return Some(problem);
                    }
                };
                if pieces.send(Ok(piece)).await.is_err() {
                    return None;
                }
            }
        };
        let writing = app.service.write_file(who, id, asked, source);
        let (problem, written) = futures_util::future::join(reading, writing).await;
        match problem {
            Some(problem) => Err(problem),
            None => Ok(written?),
        }
    }
}

fn stalled() -> Problem {
    Problem::new(problem::REQUEST_TIMEOUT, "nothing of the form came for 30 s")
}

fn broken(error: &multer::Error) -> Problem {
    let error: String = error.to_string().chars().take(200).collect();
    Problem::new(problem::INVALID_REQUEST, format!("the form is not understood: {error}"))
}

/// A form's body, a piece at a time: its reader would otherwise take all that there is, and hold it.
struct Sparing {
    source: BoxStream<'static, std::io::Result<Bytes>>,
    /// Bytes that were read since the reader has given something on.
    untaken: Arc<AtomicUsize>,
    rests: bool,
}

impl Stream for Sparing {
    type Item = std::io::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if std::mem::take(&mut self.rests) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let piece = std::task::ready!(self.source.poll_next_unpin(cx));
        self.rests = true;
        Poll::Ready(piece.map(|piece| {
            let piece = piece?;
            let untaken = self.untaken.fetch_add(piece.len(), Ordering::Relaxed) + piece.len();
            if untaken > MAX_UNTAKEN {
                return Err(std::io::Error::other("the head of a part is too long"));
            }
            Ok(piece)
        }))
    }
}
