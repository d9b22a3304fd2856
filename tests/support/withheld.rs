//! Callers over HTTP/2 that decide how much of an answer they take: each stream has a little room, and gets more when they say so.
#![allow(dead_code, reason = "each test takes a part of it")]

use std::time::Duration;

use bytes::Bytes;
use h2::RecvStream;
use h2::client::SendRequest;
use hyper::Request;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

/// A connection.
pub struct Streams {
    ask: SendRequest<Bytes>,
    room: usize,
}

/// An answer whose head has come.
pub struct Answer {
    /// Its status.
    pub status: u16,
    body: RecvStream,
    room: usize,
}

/// What became of an answer.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// All of it came, so many bytes.
    Whole(usize),
    /// The other side reset the stream.
    Reset(h2::Reason),
    /// Neither, in the time that was given.
    Open,
}

impl Streams {
    /// Opens one whose streams have room for so many bytes each; the connection itself never lacks any.
    pub async fn open(io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, room: u32) -> Self {
        let mut builder = h2::client::Builder::new();
        builder.initial_window_size(room).initial_connection_window_size(1 << 30);
        let (ask, connection) = builder.handshake(io).await.expect("a connection");
        cellblock::task::spawn("client", async move {
            // It ends as the test does.
            let _ = connection.await;
        });
        Self { ask, room: room as usize }
    }

    /// Asks, and waits for the head of the answer.
    pub async fn get(&self, path: &str, key: &str, headers: &[(&str, &str)]) -> Answer {
        let mut request = Request::get(format!("http://box{path}")).header("authorization", format!("Bearer {key}"));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut ask = self.ask.clone().ready().await.expect("a stream");
        let (answer, _) = ask.send_request(request.body(()).expect("a request"), true).expect("a stream");
        let answer = answer.await.expect("an answer");
        Answer { status: answer.status().as_u16(), body: answer.into_body(), room: self.room }
    }
}

impl Answer {
    /// Takes what there is room for, and makes no more room.
    pub async fn unread(&mut self, most: Duration) -> End {
        self.read(None, most).await
    }

    /// Takes all, and waits before it makes room again for what it has taken, a good part of the first room at a time: who gives it back frame by frame is sent
    /// ever smaller ones.
    pub async fn taken(mut self, pause: Duration, most: Duration) -> End {
        self.read(Some(pause), most).await
    }

    async fn read(&mut self, pause: Option<Duration>, most: Duration) -> End {
        let (late, mut bytes, mut held) = (Instant::now() + most, 0, 0);
        loop {
            match tokio::time::timeout_at(late, self.body.data()).await {
                Err(_) => return End::Open,
                Ok(None) => return End::Whole(bytes),
                Ok(Some(Err(error))) => return End::Reset(error.reason().unwrap_or_else(|| panic!("{error}"))),
                Ok(Some(Ok(data))) => {
                    bytes += data.len();
                    held += data.len();
                    // Data that is always there is no excuse.
                    if Instant::now() >= late {
                        return End::Open;
                    }
                    if let Some(pause) = pause.filter(|_| held >= self.room / 2) {
                        tokio::time::sleep(pause).await;
                        self.body.flow_control().release_capacity(held).expect("room");
                        held = 0;
                    }
                }
            }
        }
    }
}
