//! Messages in the two forms that they have on a WebSocket. Pure: what is in a message is not looked into.
//!
//! | subprotocol | frame |
//! |---|---|
//! | none, text | a JSON object with `channel`, `header`, `parent_header`, `metadata`, `content` |
//! | none, binary, where there are buffers | big-endian `u32`: how many parts, and where each begins; then the same object, and the buffers |
//! | [`V1`], always binary | little-endian `u64`: how many offsets, and these, the last one the end; then channel, header, parent header, metadata, content, buffers |

use std::borrow::Cow;

use axum::extract::ws;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::session::tap::{Channel, Message};

/// The subprotocol whose parts stand beside each other.
pub const V1: &str = "v1.kernel.websocket.jupyter.org";
/// Most buffers of a message: one of more parts is no message for the guest.
pub const MAX_BUFFERS: usize = 32;

/// Which form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Where no subprotocol was agreed on.
    Default,
    /// [`V1`].
    V1,
}

/// A message of a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incoming {
    /// Where it belongs; nothing: a channel that there is not.
    pub channel: Option<Channel>,
    /// A JSON object, or what a client says is one.
    pub header: Bytes,
    /// The same.
    pub metadata: Bytes,
    /// The same.
    pub content: Bytes,
    /// As they came.
    pub buffers: Vec<Bytes>,
}

/// Why bytes are no message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Garbage {
    /// The form has no such frames.
    #[error("this subprotocol has binary frames only")]
    Text,
    /// It is not what the form says.
    #[error("a frame is not a message of this subprotocol")]
    Malformed,
    /// It has too many parts.
    #[error("a message has more than {MAX_BUFFERS} buffers")]
    Buffers,
}

/// Reads a text frame.
///
/// # Errors
/// See [`Garbage`].
pub fn read_text(form: Form, text: &str) -> Result<Incoming, Garbage> {
    match form {
        Form::Default => read_object(text, Vec::new()),
        Form::V1 => Err(Garbage::Text),
    }
}

/// Reads a binary frame.
///
/// # Errors
/// See [`Garbage`].
pub fn read_binary(form: Form, frame: &Bytes) -> Result<Incoming, Garbage> {
    match form {
        Form::Default => {
            let parts = read_default(frame)?;
            let [text, buffers @ ..] = &parts[..] else { return Err(Garbage::Malformed) };
            read_object(std::str::from_utf8(text).map_err(|_| Garbage::Malformed)?, buffers.to_vec())
        }
        Form::V1 => {
            let parts = read_v1(frame)?;
            let [channel, header, _parent, metadata, content, buffers @ ..] = &parts[..] else {
                return Err(Garbage::Malformed);
            };
            if buffers.len() > MAX_BUFFERS {
                return Err(Garbage::Buffers);
            }
            let channel = std::str::from_utf8(channel).ok().and_then(read_channel);
            let [header, metadata, content] = [header, metadata, content].map(Bytes::clone);
            Ok(Incoming { channel, header, metadata, content, buffers: buffers.to_vec() })
        }
    }
}

fn read_object(text: &str, buffers: Vec<Bytes>) -> Result<Incoming, Garbage> {
    #[derive(Deserialize)]
    struct Object<'a> {
        /// Some clients leave it out.
        #[serde(borrow, default)]
        channel: Option<Cow<'a, str>>,
        #[serde(borrow)]
        header: &'a RawValue,
        #[serde(borrow, default)]
        metadata: Option<&'a RawValue>,
        #[serde(borrow, default)]
        content: Option<&'a RawValue>,
    }
    if buffers.len() > MAX_BUFFERS {
        return Err(Garbage::Buffers);
    }
    let object: Object<'_> = serde_json::from_str(text).map_err(|_| Garbage::Malformed)?;
    let part = |raw: Option<&RawValue>| {
        raw.map_or_else(|| Bytes::from_static(b"{}"), |raw| Bytes::copy_from_slice(raw.get().as_bytes()))
    };
    Ok(Incoming {
        channel: object.channel.map_or(Some(Channel::Shell), |channel| read_channel(&channel)),
        header: part(Some(object.header)),
        metadata: part(object.metadata),
        content: part(object.content),
        buffers,
    })
}

fn read_default(frame: &Bytes) -> Result<Vec<Bytes>, Garbage> {
    let number = |at: usize| {
        let bytes = frame.get(4 * at..4 * at + 4)?;
        usize::try_from(u32::from_be_bytes(bytes.try_into().ok()?)).ok()
    };
    let count = number(0).filter(|count| *count >= 1).ok_or(Garbage::Malformed)?;
    if count > MAX_BUFFERS + 1 {
        return Err(Garbage::Buffers);
    }
    let offsets = (1..=count).map(number).chain([Some(frame.len())]).collect::<Option<Vec<_>>>();
    cut(frame, 4 * (count + 1), &offsets.ok_or(Garbage::Malformed)?)
}

fn read_v1(frame: &Bytes) -> Result<Vec<Bytes>, Garbage> {
    let number = |at: usize| {
        let bytes = frame.get(8 * at..8 * at + 8)?;
        usize::try_from(u64::from_le_bytes(bytes.try_into().ok()?)).ok()
    };
    let count = number(0).filter(|count| *count >= 2).ok_or(Garbage::Malformed)?;
    if count > MAX_BUFFERS + 6 {
        return Err(Garbage::Buffers);
    }
    let offsets = (1..=count).map(number).collect::<Option<Vec<_>>>().ok_or(Garbage::Malformed)?;
    if offsets.last() != Some(&frame.len()) {
        return Err(Garbage::Malformed);
    }
    cut(frame, 8 * (count + 1), &offsets)
}

/// The parts between offsets, none of which may lie before the end of the head.
fn cut(frame: &Bytes, head: usize, offsets: &[usize]) -> Result<Vec<Bytes>, Garbage> {
    let is_sound =
        offsets.first().is_some_and(|first| *first >= head) && offsets.last().is_some_and(|last| *last <= frame.len());
    if !is_sound || offsets.windows(2).any(|pair| pair[0] > pair[1]) {
        return Err(Garbage::Malformed);
    }
    Ok(offsets.windows(2).map(|pair| frame.slice(pair[0]..pair[1])).collect())
}

fn read_channel(name: &str) -> Option<Channel> {
    match name {
        "shell" => Some(Channel::Shell),
        "control" => Some(Channel::Control),
        "stdin" => Some(Channel::Stdin),
        _ => None,
    }
}

fn name_of(channel: Channel) -> &'static str {
    match channel {
        Channel::Shell => "shell",
        Channel::Iopub => "iopub",
        Channel::Stdin => "stdin",
        Channel::Control => "control",
    }
}

/// Writes a message. Nothing when it has no four parts, or they are no JSON.
#[must_use]
pub fn write(form: Form, message: &Message) -> Option<ws::Message> {
    let [header, parent, metadata, content, buffers @ ..] = &message.parts[..] else { return None };
    let parts = [header, parent, metadata, content];
    match form {
        Form::Default if buffers.is_empty() => {
            String::from_utf8(object(message, parts)?).ok().map(|text| ws::Message::Text(text.into()))
        }
        Form::Default => {
            let object = Bytes::from(object(message, parts)?);
            let parts: Vec<&Bytes> = [&object].into_iter().chain(buffers).collect();
            Some(ws::Message::Binary(write_default(&parts)?))
        }
        Form::V1 => {
            let channel = Bytes::from_static(name_of(message.channel).as_bytes());
            let parts: Vec<&Bytes> = [&channel].into_iter().chain(parts).chain(buffers).collect();
            Some(ws::Message::Binary(write_v1(&parts)))
        }
    }
}

fn object(message: &Message, [header, parent, metadata, content]: [&Bytes; 4]) -> Option<Vec<u8>> {
    #[derive(Serialize)]
    struct Object<'a> {
        header: &'a RawValue,
        /// Clients read these two here.
        msg_id: &'a str,
        msg_type: &'a str,
        parent_header: &'a RawValue,
        metadata: &'a RawValue,
        content: &'a RawValue,
        buffers: [(); 0],
        channel: &'static str,
    }
    let raw = |part| serde_json::from_slice::<&RawValue>(part).ok();
    let object = Object {
        header: raw(header)?,
        msg_id: &message.msg_id,
        msg_type: &message.msg_type,
        parent_header: raw(parent)?,
        metadata: raw(metadata)?,
        content: raw(content)?,
        buffers: [],
        channel: name_of(message.channel),
    };
    serde_json::to_vec(&object).ok()
}

fn write_default(parts: &[&Bytes]) -> Option<Bytes> {
    let mut frame = u32::try_from(parts.len()).ok()?.to_be_bytes().to_vec();
    let mut at = 4 * (parts.len() + 1);
    for part in parts {
        frame.extend_from_slice(&u32::try_from(at).ok()?.to_be_bytes());
        at += part.len();
    }
    parts.iter().for_each(|part| frame.extend_from_slice(part));
    Some(frame.into())
}

fn write_v1(parts: &[&Bytes]) -> Bytes {
    let mut frame = (parts.len() as u64 + 1).to_le_bytes().to_vec();
    let mut at = 8 * (parts.len() + 2);
    frame.extend_from_slice(&(at as u64).to_le_bytes());
    for part in parts {
        at += part.len();
        frame.extend_from_slice(&(at as u64).to_le_bytes());
    }
    parts.iter().for_each(|part| frame.extend_from_slice(part));
    frame.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(channel: Channel, content: &str, buffers: Vec<Vec<u8>>) -> Message {
        let fixed = [r#"{"msg_id":"m"}"#, "{}", r#"{"a":1}"#, content].map(|part| Bytes::from(part.to_owned()));
        let parts = fixed.into_iter().chain(buffers.into_iter().map(Bytes::from)).collect();
        let (msg_id, msg_type) = ("m".to_owned(), "comm_msg".to_owned());
        Message { channel, msg_type, msg_id, parts, of: None, only: None }
    }

    fn read(form: Form, frame: &ws::Message) -> Result<Incoming, Garbage> {
        match frame {
            ws::Message::Text(text) => read_text(form, text.as_str()),
            ws::Message::Binary(bytes) => read_binary(form, bytes),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_client_may_leave_out_what_some_leave_out() {
        let read = |text: &str| read_text(Form::Default, text);
        let lean = read(r#"{"header": {"msg_id": "a"}, "content": {}, "buffers": {}}"#).unwrap();
        assert_eq!((lean.channel, &lean.metadata[..]), (Some(Channel::Shell), &b"{}"[..]));
        assert_eq!(read(r#"{"channel": "weird", "header": {}}"#).unwrap().channel, None);
        assert_eq!(read(r#"{"channel": "iopub", "header": {}}"#).unwrap().channel, None, "nobody says anything there");
        for garbage in ["", "null", "[]", "{}", "{\"header\": ", "\u{0}"] {
            assert_eq!(read(garbage), Err(Garbage::Malformed), "{garbage}");
        }
        assert_eq!(read_text(Form::V1, "{}"), Err(Garbage::Text));
    }

    #[test]
    fn the_default_form_names_a_message_where_clients_look() {
        let Some(ws::Message::Text(text)) = write(Form::Default, &message(Channel::Iopub, "{}", Vec::new())) else {
            panic!("no text")
        };
        let json: serde_json::Value = serde_json::from_str(text.as_str()).unwrap();
        assert_eq!(
            (&json["msg_id"], &json["msg_type"], &json["channel"]),
            (&"m".into(), &"comm_msg".into(), &"iopub".into())
        );
        assert_eq!(json["buffers"], serde_json::json!([]));
    }

    #[test]
    fn offsets_that_lie_are_garbage() {
        for (form, numbers) in [
            (Form::Default, vec![0, 0, 0, 1, 0, 0, 0, 0]),
            (Form::Default, vec![0, 0, 0, 2, 0, 0, 0, 12, 0, 0, 0, 11, 1]),
            (Form::Default, vec![0xff; 16]),
            (Form::V1, vec![0xff; 64]),
            (Form::V1, [2_u64, 24, 99].iter().flat_map(|n| n.to_le_bytes()).collect()),
        ] {
            assert!(read_binary(form, &Bytes::from(numbers)).is_err());
        }
        let many = vec![Vec::new(); MAX_BUFFERS + 1];
        for form in [Form::Default, Form::V1] {
            let frame = write(form, &message(Channel::Shell, "{}", many.clone())).unwrap();
            assert_eq!(read(form, &frame), Err(Garbage::Buffers));
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back_in_both_forms(
            text in ".{0,40}", buffers in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..20), 0..5),
            v1 in any::<bool>(), at in 0usize..3,
        ) {
            let form = if v1 { Form::V1 } else { Form::Default };
            let channel = [Channel::Shell, Channel::Control, Channel::Stdin][at];
            let content = serde_json::json!({"text": text}).to_string();
            let message = message(channel, &content, buffers.clone());
            let incoming = read(form, &write(form, &message).unwrap()).unwrap();
            prop_assert_eq!(incoming.channel, Some(channel));
            prop_assert_eq!(&incoming.header, &message.parts[0]);
            prop_assert_eq!(&incoming.metadata, &message.parts[2]);
            prop_assert_eq!(&incoming.content[..], content.as_bytes());
            prop_assert_eq!(incoming.buffers, buffers.into_iter().map(Bytes::from).collect::<Vec<_>>());
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(prop_oneof![any::<u8>(), 0u8..4], 0..80), text in ".{0,60}") {
            let bytes = Bytes::from(bytes);
            let _ = (read_binary(Form::Default, &bytes), read_binary(Form::V1, &bytes));
            let _ = (read_text(Form::Default, &text), read_text(Form::Default, &format!("{{\"header\":{text}}}")));
        }
    }
}
