//! A client of the Jupyter door: its REST calls, and both subprotocols of a kernel's WebSocket. Knows nothing of what is tested.
#![allow(dead_code, reason = "each test takes a part of it")]
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

use futures_util::{SinkExt, StreamExt};
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::{self, client::IntoClientRequest};

use crate::server::{NEVER, Reply, Server, text};

/// The subprotocol whose parts stand beside each other.
const V1: &str = "v1.kernel.websocket.jupyter.org";

/// A request with the key where Jupyter's clients put it.
pub fn asks(server: &Server, method: Method, path: &str) -> RequestBuilder {
    server.bare(method, path).header("authorization", format!("token {}", server.key))
}

pub async fn get(server: &Server, path: &str) -> Reply {
    server.send(asks(server, Method::GET, path)).await
}

pub async fn post(server: &Server, path: &str, body: Value) -> Reply {
    let request = asks(server, Method::POST, path);
    server.send(if body.is_null() { request } else { request.body(body.to_string()) }).await
}

pub async fn delete(server: &Server, path: &str) -> u16 {
    server.send(asks(server, Method::DELETE, path)).await.status
}

/// Starts a kernel and answers with its id.
pub async fn kernel(server: &Server) -> String {
    let made = post(server, "/api/kernels", Value::Null).await;
    assert_eq!(made.status, 201, "{}", made.text);
    text(&made.json["id"])
}

/// A client of a kernel's channels.
pub struct Client {
    pub socket: tokio_tungstenite::WebSocketStream<tokio_tungstenite::MaybeTlsStream<tokio::net::TcpStream>>,
    is_v1: bool,
    /// What its headers say of itself.
    pub session: String,
    sent: u32,
}

/// What came.
#[derive(Debug, Clone)]
pub struct Got {
    pub channel: String,
    pub msg_type: String,
    pub msg_id: String,
    /// Whole header of the parent.
    pub parent: Value,
    pub content: Value,
    pub buffers: Vec<Vec<u8>>,
}

#[derive(Debug)]
pub enum Frame {
    Got(Box<Got>),
    /// The connection has ended, with this code if there was one.
    Closed(Option<u16>),
}

impl Client {
    pub async fn open(server: &Server, kernel: &str, query: &str, is_v1: bool) -> Self {
        Self::try_open(server, kernel, query, is_v1).await.unwrap_or_else(|status| panic!("{status}"))
    }

    /// Opens a connection; else the status of the answer.
    pub async fn try_open(server: &Server, kernel: &str, query: &str, is_v1: bool) -> Result<Self, u16> {
        Self::open_with(server, &server.key, (kernel, query), is_v1).await
    }

    /// The same with another key.
    pub async fn open_with(
        server: &Server,
        key: &str,
        (kernel, query): (&str, &str),
        is_v1: bool,
    ) -> Result<Self, u16> {
        let url = format!("{}/api/kernels/{kernel}/channels{query}", server.url.replace("http", "ws"));
        let mut request = url.into_client_request().expect("a request");
        let headers = request.headers_mut();
        headers.insert("authorization", format!("token {key}").parse().expect("a header"));
        if is_v1 {
            headers.insert("sec-websocket-protocol", V1.parse().expect("a header"));
        }
        match tokio_tungstenite::connect_async(request).await {
            Ok((socket, response)) => {
                assert_eq!(response.headers().get("sec-websocket-protocol").is_some(), is_v1);
                Ok(Self { socket, is_v1, session: uuid::Uuid::new_v4().to_string(), sent: 0 })
            }
            Err(tungstenite::Error::Http(response)) => Err(response.status().as_u16()),
            Err(error) => panic!("{error}"),
        }
    }

    /// Sends a message; answers with its header.
    pub async fn send(&mut self, channel: &str, msg_type: &str, content: Value, buffers: &[&[u8]]) -> Value {
        self.sent += 1;
        let header = json!({
            "msg_id": format!("{}-{}", self.session, self.sent), "msg_type": msg_type, "session": self.session,
            "username": "me", "date": "2026-01-01T00:00:00.000000Z", "version": "5.3",
        });
        let frame = if self.is_v1 {
            let parts = [json!({}), json!({}), content].map(|part| part.to_string().into_bytes());
            let parts = [channel.as_bytes().to_vec(), header.to_string().into_bytes()].into_iter().chain(parts);
            tungstenite::Message::Binary(v1_frame(&parts.chain(buffers.iter().map(|b| b.to_vec())).collect::<Vec<_>>()))
        } else {
            let object =
                json!({"channel": channel, "header": header, "parent_header": {}, "metadata": {}, "content": content});
            match buffers {
                [] => tungstenite::Message::Text(object.to_string().into()),
                _ => {
                    let parts: Vec<_> = std::iter::once(object.to_string().into_bytes())
                        .chain(buffers.iter().map(|b| b.to_vec()))
                        .collect();
                    tungstenite::Message::Binary(default_frame(&parts))
                }
            }
        };
        self.socket.send(frame).await.expect("an open connection");
        header
    }

    pub async fn execute(&mut self, code: &str) -> Value {
        let content = json!({"code": code, "silent": false, "store_history": true, "user_expressions": {}, "allow_stdin": true, "stop_on_error": true});
        self.send("shell", "execute_request", content, &[]).await
    }

    pub async fn next(&mut self) -> Frame {
        loop {
            let frame = tokio::time::timeout(NEVER, self.socket.next()).await.expect("a message in time");
            match frame {
                Some(Ok(tungstenite::Message::Text(text))) => {
                    return Frame::Got(Box::new(read_object(text.as_bytes(), Vec::new())));
                }
                Some(Ok(tungstenite::Message::Binary(bytes))) => {
                    return Frame::Got(Box::new(if self.is_v1 { read_v1(&bytes) } else { read_default(&bytes) }));
                }
                Some(Ok(tungstenite::Message::Close(frame))) => {
                    return Frame::Closed(frame.map(|frame| frame.code.into()));
                }
                Some(Ok(_)) => {}
                None | Some(Err(_)) => return Frame::Closed(None),
            }
        }
    }

    pub async fn got(&mut self) -> Got {
        match self.next().await {
            Frame::Got(got) => *got,
            Frame::Closed(code) => panic!("closed with {code:?}"),
        }
    }

    /// All that belongs to a message, up to the reply and the idle status. Others' messages are left out.
    pub async fn all_of(&mut self, header: &Value) -> Vec<Got> {
        let (mut all, mut left) = (Vec::new(), 2);
        let is_answered = text(&header["msg_type"]).ends_with("_request");
        if !is_answered {
            left = 1;
        }
        while left > 0 {
            let got = self.got().await;
            if got.parent != *header {
                continue;
            }
            left -= usize::from(got.msg_type.ends_with("_reply"));
            left -= usize::from(got.msg_type == "status" && got.content["execution_state"] == "idle");
            all.push(got);
        }
        all
    }

    /// Runs code to its end.
    pub async fn run(&mut self, code: &str) -> Vec<Got> {
        let header = self.execute(code).await;
        self.all_of(&header).await
    }

    /// Waits for the end of the connection and answers with its code.
    pub async fn closed(&mut self) -> Option<u16> {
        loop {
            if let Frame::Closed(code) = self.next().await {
                return code;
            }
        }
    }
}

fn v1_frame(parts: &[Vec<u8>]) -> bytes::Bytes {
    let mut frame = (parts.len() as u64 + 1).to_le_bytes().to_vec();
    let mut at = 8 * (parts.len() as u64 + 2);
    frame.extend(at.to_le_bytes());
    for part in parts {
        at += part.len() as u64;
        frame.extend(at.to_le_bytes());
    }
    parts.iter().for_each(|part| frame.extend(part));
    frame.into()
}

fn default_frame(parts: &[Vec<u8>]) -> bytes::Bytes {
    let mut frame = (parts.len() as u32).to_be_bytes().to_vec();
    let mut at = 4 * (parts.len() as u32 + 1);
    for part in parts {
        frame.extend(at.to_be_bytes());
        at += part.len() as u32;
    }
    parts.iter().for_each(|part| frame.extend(part));
    frame.into()
}

fn read_object(object: &[u8], buffers: Vec<Vec<u8>>) -> Got {
    let object: Value = serde_json::from_slice(object).expect("JSON");
    assert_eq!((&object["msg_id"], &object["msg_type"]), (&object["header"]["msg_id"], &object["header"]["msg_type"]));
    Got {
        channel: text(&object["channel"]),
        msg_type: text(&object["msg_type"]),
        msg_id: text(&object["msg_id"]),
        parent: object["parent_header"].clone(),
        content: object["content"].clone(),
        buffers,
    }
}

fn read_default(frame: &[u8]) -> Got {
    let number = |at: usize| u32::from_be_bytes(frame[4 * at..4 * at + 4].try_into().unwrap()) as usize;
    let mut offsets: Vec<_> = (1..=number(0)).map(number).collect();
    offsets.push(frame.len());
    let mut parts = offsets.windows(2).map(|pair| frame[pair[0]..pair[1]].to_vec());
    let object = parts.next().expect("a part");
    read_object(&object, parts.collect())
}

fn read_v1(frame: &[u8]) -> Got {
    let number = |at: usize| u64::from_le_bytes(frame[8 * at..8 * at + 8].try_into().unwrap()) as usize;
    let offsets: Vec<_> = (1..=number(0)).map(number).collect();
    assert_eq!(offsets.last(), Some(&frame.len()));
    let parts: Vec<_> = offsets.windows(2).map(|pair| &frame[pair[0]..pair[1]]).collect();
    let [channel, header, parent, _metadata, content, buffers @ ..] = &parts[..] else { panic!("{}", parts.len()) };
    let [header, parent, content] =
        [header, parent, content].map(|part| serde_json::from_slice::<Value>(part).expect("JSON"));
    Got {
        channel: String::from_utf8(channel.to_vec()).unwrap(),
        msg_type: text(&header["msg_type"]),
        msg_id: text(&header["msg_id"]),
        parent,
        content,
        buffers: buffers.iter().map(|buffer| buffer.to_vec()).collect(),
    }
}

pub fn types(all: &[Got]) -> Vec<&str> {
    all.iter().map(|got| got.msg_type.as_str()).collect()
}

pub fn one<'a>(all: &'a [Got], msg_type: &str) -> &'a Got {
    all.iter().find(|got| got.msg_type == msg_type).unwrap_or_else(|| panic!("no {msg_type} in {:?}", types(all)))
}

pub fn printed(all: &[Got], name: &str) -> String {
    all.iter()
        .filter(|got| got.msg_type == "stream" && got.content["name"] == name)
        .map(|got| text(&got.content["text"]))
        .collect()
}
