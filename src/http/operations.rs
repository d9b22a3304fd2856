//! Which operation of the API a request asks for, by the document that the handlers make; and which of them are worth an audit event.

use std::collections::HashMap;
use std::sync::Arc;

use axum::http::Method;
use utoipa::openapi::OpenApi;

/// Operations that change nothing, though they are no GET, or nothing but a deadline, and come again and again.
const NO_EVENT: [&str; 6] =
    ["complete_code", "inspect_code", "check_code", "keepalive_session", "write_command", "resize_command"];

/// Operations that are a GET, and yet for more than looking.
const WITH_EVENT: [&str; 1] = ["open_terminal"];

/// The operations of a document.
#[derive(Debug, Default)]
pub(super) struct Operations(HashMap<(Method, String), Arc<str>>);

impl Operations {
    pub(super) fn of(document: &OpenApi) -> Self {
        let mut operations = HashMap::new();
        for (path, item) in &document.paths.paths {
            let changes = [
                (Method::POST, &item.post),
                (Method::PUT, &item.put),
                (Method::PATCH, &item.patch),
                (Method::DELETE, &item.delete),
            ];
            let looks = [(Method::GET, &item.get)];
            for (method, operation) in changes.into_iter().chain(looks) {
                let id = operation.as_ref().and_then(|operation| operation.operation_id.as_deref());
                let is_worth = |id: &&str| match method {
                    Method::GET => WITH_EVENT.contains(id),
                    _ => !NO_EVENT.contains(id),
                };
                if let Some(id) = id.filter(is_worth) {
                    operations.insert((method, path.clone()), Arc::from(id));
                }
            }
        }
        Self(operations)
    }

    /// More of them: method, route and what is done.
    pub(super) fn add(&mut self, more: impl Iterator<Item = (Method, String, &'static str)>) {
        self.0.extend(more.map(|(method, route, action)| ((method, route), Arc::from(action))));
    }

    /// The operation that a request asks for if it changes something. `route` is the template that its path matches.
    pub(super) fn worth_an_event(&self, method: &Method, route: &str) -> Option<Arc<str>> {
        // A document has no word for "the rest of the path".
        self.0.get(&(method.clone(), route.replace("{*", "{"))).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_something_is_worth_an_event() {
        let operations = Operations::of(&crate::http::docs::document());
        let action = |method, route| operations.worth_an_event(&method, route).map(|id| id.to_string());
        assert_eq!(action(Method::POST, "/v1/sessions").as_deref(), Some("create_session"));
        assert_eq!(action(Method::DELETE, "/v1/sessions/{id}").as_deref(), Some("delete_session"));
        assert_eq!(action(Method::POST, "/v1/sessions/{id}/executions").as_deref(), Some("create_execution"));
        assert_eq!(action(Method::POST, "/v1/admin/drain").as_deref(), Some("drain_server"));
        assert_eq!(action(Method::GET, "/v1/sessions/{id}/terminal").as_deref(), Some("open_terminal"));
        assert_eq!(action(Method::GET, "/v1/sessions"), None);
        assert_eq!(action(Method::POST, "/v1/sessions/{id}/keepalive"), None);
        let known: Vec<_> = operations.0.values().map(|id| &**id).collect();
        let document = crate::http::docs::document().to_json().unwrap();
        assert!(NO_EVENT.iter().all(|id| document.contains(id) && !known.contains(id)));
    }
}
