//! Executions with variables of the environment that are theirs alone: they are set before, and what was there comes back after. Both are executions of their own, silent,
//! beside it in the queue, so that no code is changed and no value stands in a notebook.
//!
//! A kernel that was replaced meanwhile knows nothing of them, and nothing is put back in it.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::json;
use tokio::sync::oneshot;

use super::trail::{self, Origin, Trail};
use super::{Error, ExecuteRequest, Service};
use crate::domain::ids::{ContextId, SessionId};
use crate::domain::spec::{self, FieldError};
use crate::service::keys::Principal;
use crate::session::execution::Execution;
use crate::task;

/// Setting a few variables takes no longer, in seconds.
const WITHIN: f64 = 10.0;

/// Languages in which variables can be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Language {
    Python,
    Deno,
    Bash,
    R,
}

impl Service {
    /// Runs code for somebody who hears of it as it runs, and takes it back if they have left before it was accepted. It has these variables besides those of its
    /// session.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn execute_within(
        self: &Arc<Self>,
        who: &Principal,
        id: SessionId,
        request: ExecuteRequest,
        env: BTreeMap<String, String>,
    ) -> Result<Arc<Execution>, Error> {
        let (answer, answered) = oneshot::channel();
        let (service, who, trail) = (Arc::clone(self), who.clone(), trail::current());
        task::spawn("execute-within", async move {
            let accepted = trail::follow(trail, service.accept_within(&who, id, request, &env)).await;
            if let Err(Ok(unheard)) = answer.send(accepted) {
                service.cancel_unheard(&who, &unheard);
            }
        });
        answered.await.unwrap_or(Err(Error::GuestUnreachable))
    }

    async fn accept_within(
        self: &Arc<Self>,
        who: &Principal,
        id: SessionId,
        request: ExecuteRequest,
        env: &BTreeMap<String, String>,
    ) -> Result<Arc<Execution>, Error> {
        let in_a_row = Arc::clone(&self.session(who, id)?.in_a_row);
        if env.is_empty() {
            let _turn = in_a_row.read().await;
            return self.execute(who, id, request, None).await;
        }
        let mut errors = Vec::new();
        spec::check_env(env, &mut errors);
        if !errors.is_empty() {
            return Err(Error::SpecRejected(errors));
        }
        let language = self.language_of(who, id, &request).await?;
        let _turn = in_a_row.write().await;
        let place = (request.context, request.language.clone());
        let before = self.aside(who, id, place, language.setting(env)).await?;
        let context = before.place.context;
        let accepted =
            self.execute(who, id, ExecuteRequest { context: Some(context), language: None, ..request }, None).await;
        if accepted.is_err() {
            self.cancel_unheard(who, &before);
        }
        let after = self.aside(who, id, (Some(context), None), language.restoring(env)).await;
        match (accepted, after) {
            (Ok(execution), Err(error)) => {
                self.cancel_unheard(who, &execution);
                self.cancel_unheard(who, &before);
                Err(error)
            }
            (accepted, _) => accepted,
        }
    }

    /// An execution of ours, which nobody has asked for.
    async fn aside(
        self: &Arc<Self>,
        who: &Principal,
        id: SessionId,
        (context, language): (Option<ContextId>, Option<String>),
        code: String,
    ) -> Result<Arc<Execution>, Error> {
        let request = ExecuteRequest {
            code,
            context,
            language,
            timeout_seconds: Some(WITHIN),
            silent: true,
            store_history: Some(false),
            ..ExecuteRequest::default()
        };
        Trail::new(Origin::default(), None, None).follow(self.execute(who, id, request, None)).await
    }

    async fn language_of(&self, who: &Principal, id: SessionId, request: &ExecuteRequest) -> Result<Language, Error> {
        let name = match &request.language {
            Some(language) => language.clone(),
            None => {
                let contexts = self.contexts(who, id).await?;
                let is_meant = |context: &super::ContextView| {
                    request.context.map_or(context.is_default, |wanted| context.id == wanted)
                };
                contexts.into_iter().find(is_meant).ok_or(Error::NotFound("context"))?.language
            }
        };
        Language::of(&name).ok_or_else(|| {
            let message = format!("in {name:?} it cannot be set; it can in python, javascript, typescript, bash and r");
            Error::SpecRejected(vec![FieldError::new("/env", message)])
        })
    }
}

impl Language {
    fn of(name: &str) -> Option<Self> {
        match super::languages::own_name(&name.to_ascii_lowercase()) {
            "python" => Some(Self::Python),
            "javascript" | "typescript" => Some(Self::Deno),
            "bash" => Some(Self::Bash),
            "r" => Some(Self::R),
            _ => None,
        }
    }

    /// Code that sets variables and remembers what was there.
    fn setting(self, env: &BTreeMap<String, String>) -> String {
        // A JSON string of nothing but texts is a literal of Python and JavaScript, too.
        let object = json!(json!(env).to_string());
        match self {
            Self::Python => {
                let code = "import json, os\nwanted = json.loads(text)\n\
                            os.environ._cellblock_kept = {name: os.environ.get(name) for name in wanted}\n\
                            os.environ.update(wanted)";
                format!("exec({}, {{'text': {object}}})", json!(code))
            }
            Self::Deno => format!(
                "{{ const kept = new Map(); for (const [name, value] of Object.entries(JSON.parse({object}))) \
                 {{ kept.set(name, Deno.env.get(name)); Deno.env.set(name, value); }} \
                 globalThis[Symbol.for('cellblock.kept')] = kept; }}"
            ),
            Self::Bash => {
                let values =
                    env.iter().map(|(name, value)| format!(" {name}={}", bash_text(value))).collect::<String>();
                format!(
                    "declare -A __cellblock_kept=(); for __cellblock_name in {}; do [ -v \"$__cellblock_name\" ] && \
                     __cellblock_kept[$__cellblock_name]=\"${{!__cellblock_name}}\"; done; export{values}",
                    names(env)
                )
            }
            Self::R => {
                let values = env.iter().map(|(name, value)| format!("\"{name}\" = {}", json!(value)));
                let values = values.collect::<Vec<_>>().join(", ");
                format!(
                    "local({{ wanted <- c({values}); \
                     options(cellblock.kept = Sys.getenv(names(wanted), unset = NA, names = TRUE)); \
                     do.call(Sys.setenv, as.list(wanted)) }})"
                )
            }
        }
    }

    /// Code that puts back what was there.
    fn restoring(self, env: &BTreeMap<String, String>) -> String {
        match self {
            Self::Python => {
                let code = "import os\n\
                            for name, value in os.environ.__dict__.pop('_cellblock_kept', {}).items():\n    \
                            if value is None: os.environ.pop(name, None)\n    else: os.environ[name] = value";
                format!("exec({}, {{}})", json!(code))
            }
            Self::Deno => {
                "{ const slot = Symbol.for('cellblock.kept'); for (const [name, value] of globalThis[slot] ?? []) \
                           { if (value === undefined) Deno.env.delete(name); else Deno.env.set(name, value); } \
                           delete globalThis[slot]; }"
                    .to_owned()
            }
            Self::Bash => format!(
                "if declare -p __cellblock_kept >/dev/null 2>&1; then for __cellblock_name in {}; do \
                 if [ -v \"__cellblock_kept[$__cellblock_name]\" ]; then \
                 export \"$__cellblock_name=${{__cellblock_kept[$__cellblock_name]}}\"; \
                 else unset \"$__cellblock_name\"; fi; done; unset __cellblock_kept __cellblock_name; fi",
                names(env)
            ),
            Self::R => "local({ kept <- getOption(\"cellblock.kept\"); options(cellblock.kept = NULL); \
                        for (name in names(kept)) if (is.na(kept[[name]])) Sys.unsetenv(name) \
                        else do.call(Sys.setenv, stats::setNames(list(kept[[name]]), name)) })"
                .to_owned(),
        }
    }
}

fn names(env: &BTreeMap<String, String>) -> String {
    env.keys().map(String::as_str).collect::<Vec<_>>().join(" ")
}

/// A text as Bash quotes it, on one line.
fn bash_text(text: &str) -> String {
    let mut quoted = "$'".to_owned();
    for c in text.chars() {
        match c {
            '\'' | '\\' => quoted.extend(['\\', c]),
            c if c.is_ascii_control() => quoted.push_str(&format!("\\x{:02x}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted.push('\'');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_texts_whatever_stands_in_them() {
        for value in
            ["plain", "it's", "a \\ b", "\"; rm -rf / #", "$(id) `id` $HOME", "two\nlines\t\u{7f}", "\u{1f600} é"]
        {
            let run =
                std::process::Command::new("bash").args(["-c", &format!("printf %s {}", bash_text(value))]).output();
            assert_eq!(String::from_utf8(run.unwrap().stdout).unwrap(), value);
        }
    }

    #[test]
    fn bash_puts_back_what_was_there() {
        let env = BTreeMap::from([("A".to_owned(), "one'\n".to_owned()), ("B".to_owned(), "two".to_owned())]);
        let script = format!(
            "export A=before\n{}\nprintf '%s|' \"$A\" \"$B\"\n{}\nprintf '%s|' \"$A\" \"${{B-none}}\"\n{}\nprintf '%s' \"$A\"",
            Language::Bash.setting(&env),
            Language::Bash.restoring(&env),
            Language::Bash.restoring(&env)
        );
        let run = std::process::Command::new("bash").args(["-c", &script]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&run.stdout), "one'\n|two|before|none|before", "{run:?}");
    }

    #[test]
    fn languages_go_by_several_names() {
        let known =
            [("Python", Language::Python), ("ts", Language::Deno), ("javascript", Language::Deno), ("R", Language::R)];
        for (name, language) in known {
            assert_eq!(Language::of(name), Some(language));
        }
        assert_eq!(Language::of("julia"), None);
    }
}
