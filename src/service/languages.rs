//! Which kernel runs a language: a session's image offers kernelspecs, and callers name languages.
//!
//! A session has one context of each language that executions name without naming a context; it is made when the first comes. Starts no kernels itself.

use super::{Error, unreachable_guest};
use crate::domain::ids::ContextId;
use crate::domain::spec::{self, FieldError};
use crate::session::{Session, fresh};

/// Names that languages go by beside their own.
const ALIASES: [(&str, &str); 7] = [
    ("js", "javascript"),
    ("ts", "typescript"),
    ("py", "python"),
    ("python3", "python"),
    ("sh", "bash"),
    ("shell", "bash"),
    ("node", "javascript"),
];

/// A language's own name, of a name in small letters.
pub(super) fn own_name(name: &str) -> &str {
    ALIASES.iter().find(|(alias, _)| *alias == name).map_or(name, |(_, own)| own)
}

/// The kernelspec of a session's image that runs a language.
///
/// # Errors
/// When there is none, with those that there are; or the guest did not answer.
pub(super) async fn kernelspec_for(session: &Session, language: &str) -> Result<String, Error> {
    let wanted = language.to_ascii_lowercase();
    let wanted = own_name(&wanted);
    let specs = session.link().await?.kernelspecs().await.map_err(|error| unreachable_guest(session.id, &error))?;
    // Names come from the image, which is as trusted as its operator makes it.
    let usable = || specs.iter().filter(|s| spec::is_name(&s.name));
    let runs = |s: &&cellblock_wire::link::KernelSpec| {
        std::iter::once(&s.language).chain(&s.also).any(|own| own.eq_ignore_ascii_case(wanted))
    };
    if let Some(found) = usable().find(runs) {
        return Ok(found.name.clone());
    }
    let known = usable().flat_map(|s| std::iter::once(&s.language).chain(&s.also));
    let mut known: Vec<_> = known.filter(|name| spec::is_name(name)).map(|name| name.to_ascii_lowercase()).collect();
    known.sort();
    known.dedup();
    let message = format!("the image has no kernel for it; it has kernels for {}", known.join(", "));
    Err(Error::SpecRejected(vec![FieldError::new("/language", message)]))
}

/// The context of a session in which executions of a language run that name no context: the default one if it is of that language, else
/// the oldest one that is, else a new one.
///
/// # Errors
/// See [`Error`].
pub(super) async fn context_for(session: &Session, language: &str) -> Result<ContextId, Error> {
    let kernelspec = kernelspec_for(session, language).await?;
    // Two executions that come at once are to share their variables.
    let _turn = session.by_language.lock().await;
    let contexts = session.contexts().await?;
    let of_language = || contexts.iter().filter(|context| context.kernelspec == kernelspec);
    if let Some(found) = of_language().find(|c| c.is_default).or_else(|| of_language().next()) {
        return Ok(found.id);
    }
    Ok(session.create_context(fresh(), Some(kernelspec), None).await?.id)
}
