//! Bodies of this door: forms in both of their encodings, and JSON, with mistakes as FastAPI tells them. An upload's form is read elsewhere, as it comes.

use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::header::CONTENT_TYPE;
use futures_util::stream;
use multer::Multipart;
use percent_encoding::percent_decode_str;
use serde_json::{Map, Value};

use super::asking::{Refusal, User, Wrong};
use crate::http::App;
use crate::http::extract::read;

/// The form of a request that is about a user.
pub(super) struct UserForm(pub User);

impl FromRequest<App> for UserForm {
    type Rejection = Refusal;

    async fn from_request(request: Request, app: &App) -> Result<Self, Refusal> {
        let kind = content_type(&request);
        let bytes = read(request.into_body(), app.bounds).await?;
        let given = match multer::parse_boundary(&kind) {
            Ok(boundary) => of_multipart(bytes, boundary).await,
            Err(_) if essence(&kind) == "application/x-www-form-urlencoded" => of_urlencoded(&bytes),
            // What is no form has no fields.
            Err(_) => Ok(None),
        };
        let user = given.and_then(|given| given.ok_or_else(|| Wrong::missing("user_id", Value::Null)));
        Ok(Self(user.and_then(User::parse).map_err(|wrong| vec![wrong])?))
    }
}

fn content_type(request: &Request) -> String {
    request.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default().to_owned()
}

fn essence(kind: &str) -> String {
    kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

/// The last value of a form's field, which is what counts where it is there twice. An empty one is none.
fn of_urlencoded(bytes: &[u8]) -> Result<Option<String>, Wrong> {
    let decoded = |text: &str| percent_decode_str(&text.replace('+', " ")).decode_utf8().map(String::from).ok();
    let text = std::str::from_utf8(bytes).map_err(|_| no_text())?;
    let mut pairs = text.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    let value = pairs.rfind(|(name, _)| decoded(name).as_deref() == Some("user_id"));
    let Some((_, value)) = value.filter(|(_, value)| !value.is_empty()) else { return Ok(None) };
    decoded(value).map(Some).ok_or_else(no_text)
}

async fn of_multipart(bytes: Bytes, boundary: String) -> Result<Option<String>, Wrong> {
    let broken = |error: multer::Error| {
        Wrong::body("form_invalid", None, error.to_string().chars().take(200).collect::<String>())
    };
    let mut form = Multipart::new(stream::once(async { Ok::<_, std::io::Error>(bytes) }), boundary);
    let mut value = None;
    while let Some(field) = form.next_field().await.map_err(broken)? {
        if field.name() == Some("user_id") {
            let bytes = field.bytes().await.map_err(broken)?;
            value = Some(String::from_utf8(bytes.into()).map_err(|_| no_text())?).filter(|value| !value.is_empty());
        }
    }
    Ok(value)
}

fn no_text() -> Wrong {
    Wrong::new("string_unicode", "user_id", "Input should be a valid string of UTF-8", Value::Null)
}

/// The two texts of a JSON body: the user, and what is named here.
pub(super) struct Json {
    fields: Map<String, Value>,
}

impl FromRequest<App> for Json {
    type Rejection = Refusal;

    async fn from_request(request: Request, app: &App) -> Result<Self, Refusal> {
        let kind = essence(&content_type(&request));
        let bytes = read(request.into_body(), app.bounds).await?;
        let is_json = kind.is_empty() || kind == "application/json" || kind.ends_with("+json");
        Ok(Self { fields: object(&bytes, is_json).map_err(|wrong| vec![wrong])? })
    }
}

fn object(bytes: &[u8], is_json: bool) -> Result<Map<String, Value>, Wrong> {
    if bytes.is_empty() {
        return Err(Wrong::body("missing", None, "Field required"));
    }
    let no_object = || {
        let message = "Input should be a valid dictionary or object to extract fields from";
        Wrong::body("model_attributes_type", None, message)
    };
    if !is_json {
        return Err(no_object());
    }
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(fields)) => Ok(fields),
        Ok(_) => Err(no_object()),
        Err(error) => {
            // Where it is, as a number of bytes, as far as lines tell it.
            let before: usize =
                bytes.split_inclusive(|b| *b == b'\n').take(error.line().saturating_sub(1)).map(<[u8]>::len).sum();
            let at = before + error.column().saturating_sub(1);
            Err(Wrong::body("json_invalid", Some(at), format!("JSON decode error: {error}")))
        }
    }
}

impl Json {
    /// The user, and the text of another field. All mistakes are told at once; what else is there is ignored.
    ///
    /// # Errors
    /// One of them is missing, or is no text.
    pub fn user_and(mut self, field: &str) -> Result<(User, String), Refusal> {
        let names = ["user_id", field];
        // All that was sent is told where a field is missing.
        let whole = names.iter().any(|name| !self.fields.contains_key(*name)).then(|| self.fields.clone());
        let mut text = |name: &str| match self.fields.remove(name) {
            Some(Value::String(text)) => Ok(text),
            Some(other) => Err(Wrong::new("string_type", name, "Input should be a valid string", other)),
            None => Err(Wrong::missing(name, whole.clone().unwrap_or_default().into())),
        };
        match (text("user_id").and_then(User::parse), text(field)) {
            (Ok(user), Ok(text)) => Ok((user, text)),
            (user, text) => Err(user.err().into_iter().chain(text.err()).collect::<Vec<_>>().into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_urlencoded_form_has_its_last_value() {
        let read = |form: &str| of_urlencoded(form.as_bytes()).unwrap();
        assert_eq!(read("user_id=a&user_id=b+c%2F%C3%A9&x=1").as_deref(), Some("b c/é"));
        assert_eq!(read("user%5Fid=a").as_deref(), Some("a"));
        for none in ["", "user_id", "user_id=", "user=a", "&&==&"] {
            assert_eq!(read(none), None, "{none}");
        }
        assert!(of_urlencoded(b"user_id=%ff").is_err() && of_urlencoded(b"user_id=\xff").is_err());
    }

    #[tokio::test]
    async fn a_multipart_form_has_its_last_value() {
        let form = "--b\r\nContent-Disposition: form-data; name=\"user_id\"\r\n\r\na b\r\n--b--\r\n";
        let read = |form: &str| of_multipart(Bytes::copy_from_slice(form.as_bytes()), "b".to_owned());
        assert_eq!(read(form).await.unwrap().as_deref(), Some("a b"));
        assert_eq!(read("--b--\r\n").await.unwrap(), None);
        assert!(read("--b\r\nnothing").await.is_err());
    }

    #[test]
    fn what_is_no_object_is_told_where() {
        assert_eq!(object(b"{\n\"a\": x}", true).unwrap_err(), {
            let error = serde_json::from_slice::<Value>(b"{\n\"a\": x}").unwrap_err();
            Wrong::body("json_invalid", Some(7), format!("JSON decode error: {error}"))
        });
        assert!(object(b"[]", true).is_err() && object(b"{}", false).is_err() && object(b"", true).is_err());
        assert!(object(b"{}", true).unwrap().is_empty());
    }

    proptest! {
        #[test]
        fn no_form_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = of_urlencoded(&bytes);
            let _ = object(&bytes, true);
        }
    }
}
