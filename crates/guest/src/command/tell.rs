//! A command's events over a byte stream with a small window of its own, so that many who follow and never read hold little of the link's. Keeps none:
//! who comes again says after which event.

use std::io;

use bytes::Bytes;
use cellblock_wire::tunnel::{Outgoing, Tunnel, narrow};
use futures_util::{Stream, StreamExt};
use hyper::body::Incoming;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Tells events until they end, or whoever follows leaves.
pub fn tell(events: impl Stream<Item = Bytes> + Send + 'static, incoming: Incoming) -> Outgoing {
    let (tunnel, outgoing) = narrow(incoming);
    tokio::spawn(pass_on(events, tunnel));
    outgoing
}

async fn pass_on(events: impl Stream<Item = Bytes> + Send, tunnel: Tunnel<Incoming>) {
    let (mut reader, mut writer) = tokio::io::split(tunnel);
    let mut events = std::pin::pin!(events);
    let telling = async {
        while let Some(event) = events.next().await {
            writer.write_all(&event).await?;
        }
        writer.shutdown().await?;
        // What is on its way is cut off with the stream, so it is held until it was taken.
        std::future::pending::<io::Result<()>>().await
    };
    // Whoever follows has nothing to say: what comes is the end.
    let leaving = async { while reader.read(&mut [0; 64]).await.is_ok_and(|read| read > 0) {} };
    tokio::select! {
        _ = telling => {}
        () = leaving => {}
    }
}
