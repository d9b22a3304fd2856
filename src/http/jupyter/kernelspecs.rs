//! Kernelspecs: the templates, as Jupyter's clients see them. `python3`, which notebooks name, is the default template under another name.

use std::collections::BTreeMap;

use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::asking::{Asking, Named, Refusal};
use crate::domain::spec::Template;
use crate::http::extract::Answer;
use crate::service::Service;

/// What notebooks and clients ask for, where they do not know better.
const PYTHON: &str = "python3";
/// The one picture that a kernelspec has.
const LOGO: &str = "logo-svg.svg";

/// Kernelspecs.
#[derive(Debug, Serialize)]
pub struct List {
    default: String,
    kernelspecs: BTreeMap<String, Spec>,
}

/// One of them.
#[derive(Debug, Serialize)]
pub struct Spec {
    name: String,
    spec: Words,
    resources: BTreeMap<&'static str, String>,
}

/// What it says of itself.
#[derive(Debug, Serialize)]
struct Words {
    argv: [String; 2],
    display_name: String,
    language: &'static str,
    env: BTreeMap<String, String>,
    metadata: BTreeMap<String, String>,
    interrupt_mode: &'static str,
    kernel_protocol_version: &'static str,
}

/// The template that a kernelspec's name means.
pub(super) fn template_of(service: &Service, name: &str) -> String {
    let default = service.default_template();
    match service.template(&default).filter(is_python) {
        Some(_) if name == PYTHON && service.template(PYTHON).is_none() => default,
        _ => name.to_owned(),
    }
}

fn is_python(template: &Template) -> bool {
    language_of(template) == "python"
}

/// The language of a template's kernels, by the names that kernelspecs have everywhere. Only a kernel could tell, and there may be none.
fn language_of(template: &Template) -> &'static str {
    match template.kernelspec.as_str() {
        "ir" => "R",
        "deno" => "typescript",
        "bash" => "bash",
        _ => "python",
    }
}

fn spec(base: &str, name: &str, template: &Template) -> Spec {
    let words = Words {
        argv: ["cellblock".to_owned(), template.name.clone()],
        display_name: if name == template.name { name.to_owned() } else { format!("{name} ({})", template.name) },
        language: language_of(template),
        env: BTreeMap::new(),
        metadata: BTreeMap::new(),
        interrupt_mode: "message",
        kernel_protocol_version: "5.3",
    };
    let resources = BTreeMap::from([("logo-svg", format!("{base}/kernelspecs/{name}/{LOGO}"))]);
    Spec { name: name.to_owned(), spec: words, resources }
}

fn list(asking: &Asking) -> List {
    let (service, base) = (&asking.app.service, &asking.base);
    let (templates, default) = (service.offered(&asking.who), service.default_template());
    let mut kernelspecs: BTreeMap<String, Spec> =
        templates.iter().map(|template| (template.name.clone(), spec(base, &template.name, template))).collect();
    let alias = templates.iter().find(|template| template.name == default && is_python(template));
    let default = match alias {
        Some(template) => {
            kernelspecs.entry(PYTHON.to_owned()).or_insert_with(|| spec(base, PYTHON, template));
            PYTHON.to_owned()
        }
        None => default,
    };
    List { default, kernelspecs }
}

pub(super) async fn list_kernelspecs(asking: Asking) -> Answer<List> {
    Answer(list(&asking))
}

pub(super) async fn get_kernelspec(asking: Asking, Named(name): Named) -> Result<Answer<Spec>, Refusal> {
    let found = list(&asking).kernelspecs.remove(&name);
    found.map(Answer).ok_or_else(|| Refusal::missing(format!("Kernel spec {name} not found")))
}

/// The picture of a kernelspec.
pub(super) async fn get_resource(asking: Asking, Named(name): Named) -> Result<Response, Refusal> {
    const SVG: &str = r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64"><rect x="6" y="6" width="52" height="52" rx="8" fill="#334155"/><path d="M18 6v52M32 6v52M46 6v52" stroke="#f8fafc" stroke-width="4"/></svg>"##;
    if !list(&asking).kernelspecs.contains_key(&name) {
        return Err(Refusal::missing(format!("Kernel spec {name} not found")));
    }
    Ok(([(header::CONTENT_TYPE, "image/svg+xml")], SVG).into_response())
}
