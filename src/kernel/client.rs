//! Messages between a kernel and clients that speak Jupyter themselves: what is read of a client's, and the headers of what it is told.
//!
//! A message of a client goes to the kernel as one of ours, under an id of ours: so no client can take another's answers, and none can be told that a kernel has
//! answered what it has not been asked. On the way back the client's own header stands as the parent again. Written after "Messaging in Jupyter" (5.4).

use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::protocol::{self, Request};
use crate::domain::output::JsonText;
use crate::json;

/// Longest header of a client, in bytes: it is kept with what it has asked for.
const MAX_HEADER: usize = 4096;
/// Longest id, type and name in a header, in bytes.
const MAX_NAME: usize = 256;
/// What stands as the session in the header of all that clients are told, whether a kernel has said it or not: JupyterLab's library gives up what it has not worked on
/// yet when a message with another session comes.
const SESSION: &str = "cellblock";

/// The header of a client's message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientHeader {
    /// As it came.
    pub text: JsonText,
    /// Its id, as the client has it.
    pub msg_id: String,
    /// What it is.
    pub msg_type: String,
    /// The part of the kernel that is to work on it, where that is not its first one.
    pub subshell_id: Option<String>,
}

/// A header that can't be answered to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "a header is a JSON object of at most {MAX_HEADER} bytes with \"msg_id\" and \"msg_type\", of at most {MAX_NAME} bytes each"
)]
pub struct UnreadableHeader;

impl ClientHeader {
    /// Reads a header.
    ///
    /// # Errors
    /// When it can't be answered to.
    pub fn read(bytes: &[u8]) -> Result<Self, UnreadableHeader> {
        #[derive(Deserialize)]
        struct Header {
            msg_id: String,
            msg_type: String,
            #[serde(default)]
            subshell_id: Option<String>,
        }
        let text = Some(bytes).filter(|bytes| bytes.len() <= MAX_HEADER).ok_or(UnreadableHeader)?;
        let text = protocol::read_object(text).ok_or(UnreadableHeader)?;
        let Header { msg_id, msg_type, subshell_id } = serde_json::from_str(&text.0).map_err(|_| UnreadableHeader)?;
        let is_name = |text: &str| (1..=MAX_NAME).contains(&text.len());
        let is_type = msg_type.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'));
        let names = [Some(&msg_id), Some(&msg_type), subshell_id.as_ref()];
        let is_fit = is_type && names.into_iter().flatten().all(|name| is_name(name));
        if is_fit { Ok(Self { text, msg_id, msg_type, subshell_id }) } else { Err(UnreadableHeader) }
    }
}

/// A client's message as one of ours. Metadata, content and buffers go on as they came.
#[must_use]
pub fn passed(msg_id: &str, session: &str, header: &ClientHeader, rest: [Bytes; 2], buffers: &[Bytes]) -> Request {
    let mut ours = protocol::header(msg_id, session, &header.msg_type);
    if let Some(subshell) = &header.subshell_id {
        ours["subshell_id"] = subshell.as_str().into();
    }
    let [metadata, content] = rest;
    let fixed = [Bytes::from(ours.to_string()), Bytes::from_static(b"{}"), metadata, content];
    Request { msg_id: msg_id.to_owned(), parts: fixed.into_iter().chain(buffers.iter().cloned()).collect() }
}

/// Parts of a kernel's message as a client can read them, with this parent, and another id where one is given; nothing when they can't be made fit.
#[must_use]
pub fn retold(parts: &[Bytes], parent: Option<&JsonText>, msg_id: Option<&str>) -> Option<(String, Vec<Bytes>)> {
    let [header, own_parent, metadata, content, buffers @ ..] = parts else { return None };
    let (msg_id, header) = readdressed(header, msg_id)?;
    let parent = parent.map_or_else(|| fit(own_parent), |parent| Some(Bytes::from(parent.0.clone())));
    let fixed = [header, parent?, fit(metadata)?, fit(content)?];
    Some((msg_id, fixed.into_iter().chain(buffers.iter().cloned()).collect()))
}

/// What a kernel says of itself, without what clients would try in vain: debuggers and subshells run code outside of executions.
#[must_use]
pub fn without_side_doors(content: &Bytes) -> Bytes {
    let Some(mut told) =
        protocol::read_object(content).and_then(|text| serde_json::from_str::<Map<_, _>>(&text.0).ok())
    else {
        return content.clone();
    };
    told.remove("debugger");
    if let Some(Value::Array(features)) = told.get_mut("supported_features") {
        features.retain(|feature| !["debugger", "kernel subshells"].map(Value::from).contains(feature));
    }
    Bytes::from(Value::Object(told).to_string())
}

fn fit(part: &[u8]) -> Option<Bytes> {
    protocol::read_object(part).map(|text| Bytes::from(text.0))
}

/// A kernel's header as clients are told it, with another id where one is given, and its id.
fn readdressed(header: &[u8], msg_id: Option<&str>) -> Option<(String, Bytes)> {
    let text = String::from_utf8_lossy(header);
    let mut header: Map<String, Value> = serde_json::from_str(json::clean(&text).ok()?.get()).ok()?;
    if let Some(msg_id) = msg_id {
        header.insert("msg_id".to_owned(), msg_id.into());
    }
    header.insert("session".to_owned(), SESSION.into());
    let msg_id = header.get("msg_id").and_then(Value::as_str).unwrap_or_default().to_owned();
    Some((msg_id, Bytes::from(Value::Object(header).to_string())))
}

/// A message that no kernel has sent, in a kernel's form.
#[must_use]
pub fn told(
    msg_id: &str,
    msg_type: &str,
    parent: Option<&JsonText>,
    content: &Value,
    buffers: Vec<Bytes>,
) -> Vec<Bytes> {
    let parent = parent.map_or_else(|| Bytes::from_static(b"{}"), |parent| Bytes::from(parent.0.clone()));
    let header = protocol::header(msg_id, SESSION, msg_type).to_string();
    let fixed = [Bytes::from(header), parent, Bytes::from_static(b"{}"), Bytes::from(content.to_string())];
    fixed.into_iter().chain(buffers).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_header_is_kept_as_it_came() {
        let text = r#"{"msg_id":"a","msg_type":"execute_request","session":"s","username":"u","date":"","more":[1]}"#;
        let header = ClientHeader::read(text.as_bytes()).unwrap();
        assert_eq!((header.text.0.as_str(), header.msg_id.as_str()), (text, "a"));
        for wrong in [
            "[]",
            "{}",
            r#"{"msg_id": "", "msg_type": "x"}"#,
            r#"{"msg_id": 1, "msg_type": "x"}"#,
            r#"{"msg_id": "a", "msg_type": "x y"}"#,
            r#"{"msg_id": "a", "msg_type": "x", "subshell_id": ""}"#,
        ] {
            assert_eq!(ClientHeader::read(wrong.as_bytes()), Err(UnreadableHeader), "{wrong}");
        }
        let long = format!(r#"{{"msg_id": "a", "msg_type": "x", "y": "{}"}}"#, "z".repeat(MAX_HEADER));
        assert!(ClientHeader::read(long.as_bytes()).is_err());
    }

    #[test]
    fn a_kernel_says_nothing_of_what_clients_can_not_have() {
        let told = br#"{"status":"ok","debugger":true,"supported_features":["debugger","kernel subshells","x"]}"#;
        let told: Value = serde_json::from_slice(&without_side_doors(&Bytes::from_static(told))).unwrap();
        assert_eq!(told, serde_json::json!({"status": "ok", "supported_features": ["x"]}));
        assert_eq!(without_side_doors(&Bytes::from_static(b"[")), "[");
    }

    #[test]
    fn a_message_keeps_its_parts_and_gets_its_parent_back() {
        let header = ClientHeader::read(br#"{"msg_id":"a","msg_type":"comm_msg","subshell_id":"s1"}"#).unwrap();
        let rest = [Bytes::from_static(b"{\"m\":1}"), Bytes::from_static(b"{\"c\": NaN}")];
        let sent = passed("ours", "us", &header, rest.clone(), &[Bytes::from_static(b"\0\xff")]);
        assert_eq!(sent.parts[2..4], rest);
        assert_eq!(sent.parts[4], Bytes::from_static(b"\0\xff"));
        let ours: Value = serde_json::from_slice(&sent.parts[0]).unwrap();
        assert_eq!((&ours["msg_id"], &ours["subshell_id"]), (&"ours".into(), &"s1".into()));

        let of_kernel = [
            r#"{"msg_id":"k","msg_type":"status","session":"of the kernel"}"#,
            r#"{"msg_id":"ours"}"#,
            "{}",
            r#"{"a":1}"#,
        ];
        let of_kernel = of_kernel.map(|part| Bytes::from_static(part.as_bytes()));
        let (id, told) = retold(&of_kernel, Some(&header.text), Some("new")).unwrap();
        assert_eq!((id.as_str(), &told[1][..]), ("new", header.text.0.as_bytes()));
        let (of_kernel_told, of_nobody): (Value, Value) = (
            serde_json::from_slice(&told[0]).unwrap(),
            serde_json::from_slice(&super::told("b", "status", None, &Value::Null, Vec::new())[0]).unwrap(),
        );
        assert_eq!(of_kernel_told["msg_id"], "new");
        assert_eq!(of_kernel_told["session"], of_nobody["session"], "whoever has said it");
        assert_eq!(retold(&of_kernel, None, None).unwrap().1[1], of_kernel[1]);
    }

    proptest! {
        #[test]
        fn whatever_a_kernel_sends_is_told_as_json_or_not_at_all(parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..6)) {
            let parts: Vec<Bytes> = parts.into_iter().map(Bytes::from).collect();
            if let Some((_, told)) = retold(&parts, None, Some("x")) {
                for part in &told[..4] {
                    prop_assert!(serde_json::from_slice::<Map<String, Value>>(part).is_ok());
                }
            }
        }
    }
}
