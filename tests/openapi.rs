//! The API's document as it was last agreed on: every change of the API shows in the snapshot beside this file.
#![allow(clippy::unwrap_used, reason = "a test that finds something else is to fail")]

use cellblock::http::docs;

#[test]
fn the_document_is_the_one_agreed_on() {
    insta::assert_snapshot!("openapi", docs::document().to_pretty_json().unwrap());
}

#[test]
fn every_operation_has_an_id_a_summary_and_a_refusal() {
    let document: serde_json::Value = serde_json::from_str(&docs::document().to_json().unwrap()).unwrap();
    assert!(document["openapi"].as_str().unwrap().starts_with("3.1"));
    let mut operations = 0;
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, operation) in methods.as_object().unwrap().iter().filter(|(name, _)| *name != "parameters") {
            operations += 1;
            assert!(operation["operationId"].is_string(), "{method} {path}");
            assert!(operation["summary"].is_string(), "{method} {path}");
            assert!(operation["responses"]["4XX"].is_object(), "{method} {path}");
        }
    }
    assert!(operations >= 14, "only {operations} operations");
}
