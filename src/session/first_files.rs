//! The files that a session begins with: put in place before any code runs in it. Those that come later are the business of others.

use std::convert::Infallible;

use bytes::Bytes;
use cellblock_wire::files::Write;
use http_body_util::{BodyExt, Full};

use super::{StartFailure, StartFault};
use crate::domain::spec::NewFile;
use crate::kernel::link::{Link, LinkError};

/// Puts them in place, one after the other.
pub(super) async fn put(link: &Link, files: &[NewFile]) -> Result<(), StartFailure> {
    for file in files {
        let size = u64::try_from(file.content.len()).ok();
        let asked = Write { path: file.path.clone(), size, ..Write::default() };
        let body = Full::new(Bytes::copy_from_slice(&file.content)).map_err(|never: Infallible| match never {});
        link.write_file(&asked, body).await.map_err(|error| failure(&file.path, &error))?;
    }
    Ok(())
}

fn failure(path: &str, error: &LinkError) -> StartFailure {
    tracing::warn!(%error, "a file that a session begins with could not be put in place");
    let (fault, why) = match error {
        LinkError::Refused { refusal, .. } if refusal.code == "no-space" => {
            (StartFault::SetupFailed, "there is no room")
        }
        LinkError::Refused { .. } => (StartFault::SetupFailed, "another of the files is in the way"),
        _ => (StartFault::GuestUnreachable, "the container did not answer"),
    };
    StartFailure { fault, detail: format!("the file {path:?} could not be put in place: {why}") }
}
