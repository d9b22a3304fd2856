//! Packages that may be installed into sessions: how one is named, and what a template permits. Pure; nothing here knows an index, and nothing is installed.
//!
//! A requirement is a name, extras and versions (`polars[async]>=1.2,<2`) as of PEP 508 and PEP 440, and nothing else of them: no URL, no path, no marker, no option, no space,
//! and no `===`. What is read is written anew before a program sees it.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use pep440_rs::{Operator, Version, VersionSpecifiers};

use super::egress::Host;
use super::spec::FieldError;

/// Most packages that are asked for at once, and most that a template lists.
pub const MAX_REQUIREMENTS: usize = 64;
/// Longest requirement, in bytes.
const MAX_LENGTH: usize = 200;
/// Longest name of a package or an extra, in bytes.
const MAX_NAME: usize = 100;
/// Most extras of one requirement.
const MAX_EXTRAS: usize = 16;

/// A package, and which versions of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Requirement {
    /// Its name, in the one spelling of PEP 503.
    pub name: String,
    /// What of it is wanted beside the package itself.
    pub extras: BTreeSet<String>,
    /// Its versions; all of them when empty.
    pub versions: VersionSpecifiers,
}

impl fmt::Display for Requirement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        if !self.extras.is_empty() {
            let extras: Vec<&str> = self.extras.iter().map(String::as_str).collect();
            write!(f, "[{}]", extras.join(","))?;
        }
        let versions: Vec<String> = self.versions.iter().map(ToString::to_string).collect();
        f.write_str(&versions.join(","))
    }
}

impl Requirement {
    /// Reads a requirement.
    ///
    /// # Errors
    /// What is wrong, and what is allowed.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| {
            let shown: String = text.chars().take(MAX_LENGTH).collect();
            format!(
                "{shown:?}: {why}. Allowed is a package's name with extras and versions or without, such as \"polars\", \"numpy>=2,<3\" or \"httpx[http2]==0.28\": no URL, \
                 path, option, marker or space"
            )
        };
        if text.len() > MAX_LENGTH {
            return Err(wrong("it is longer than 200 bytes"));
        }
        let end = text.find(|c: char| !is_of_name(c)).unwrap_or(text.len());
        let (name, rest) = text.split_at(end);
        let name = normal(name).ok_or_else(|| wrong("it does not begin with a name"))?;
        let (extras, versions) = match rest.strip_prefix('[') {
            Some(inner) => inner.split_once(']').ok_or_else(|| wrong("a bracket is not closed"))?,
            None => ("", rest),
        };
        let extras: Option<BTreeSet<String>> = match rest.starts_with('[') {
            true => extras.split(',').map(normal).collect(),
            false => Some(BTreeSet::new()),
        };
        let extras =
            extras.filter(|extras| extras.len() <= MAX_EXTRAS).ok_or_else(|| wrong("its extras are no names"))?;
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "._-+!*<>=~,".contains(c);
        if !versions.chars().all(is_plain) {
            return Err(wrong("what follows its name is no version"));
        }
        let versions =
            VersionSpecifiers::from_str(versions).map_err(|_| wrong("what follows its name is no version"))?;
        if versions.iter().any(|specifier| *specifier.operator() == Operator::ExactEqual) {
            return Err(wrong("\"===\" compares texts and not versions"));
        }
        Ok(Self { name, extras, versions })
    }
}

fn is_of_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || "._-".contains(c)
}

/// The one spelling of a package's name (PEP 503); nothing if it is none.
#[must_use]
pub fn normal(name: &str) -> Option<String> {
    let is_end = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = name.as_bytes();
    let is_name =
        name.chars().all(is_of_name) && is_end(bytes.first()) && is_end(bytes.last()) && name.len() <= MAX_NAME;
    let parts = || name.split(['.', '_', '-']).filter(|part| !part.is_empty());
    is_name.then(|| parts().collect::<Vec<_>>().join("-").to_ascii_lowercase())
}

/// The package and the version that a wheel's name tells of (PEP 427); nothing if it is no wheel's.
#[must_use]
pub fn of_wheel(file: &str) -> Option<(String, Version)> {
    let parts: Vec<&str> = file.strip_suffix(".whl")?.split('-').collect();
    let is_plain = file.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-+!".contains(&b));
    match (is_plain, parts.len()) {
        (true, 5 | 6) => Some((normal(parts[0])?, Version::from_str(parts[1]).ok()?)),
        _ => None,
    }
}

/// What may be installed.
#[derive(Debug, Clone, PartialEq, Eq, Default, Hash)]
pub enum PackagePolicy {
    /// Nothing.
    #[default]
    None,
    /// All that the index has.
    Any,
    /// These, and nothing that they need unless it is among them too.
    Listed(Arc<[Requirement]>),
}

impl fmt::Display for PackagePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Any => f.write_str("any"),
            Self::Listed(listed) => {
                let listed: Vec<String> = listed.iter().map(ToString::to_string).collect();
                f.write_str(&listed.join(" "))
            }
        }
    }
}

impl PackagePolicy {
    /// Whether anything may be installed.
    #[must_use]
    pub fn is_open(&self) -> bool {
        *self != Self::None
    }

    /// Whether some version of a package may be.
    #[must_use]
    pub fn admits(&self, name: &str) -> bool {
        match self {
            Self::None => false,
            Self::Any => true,
            Self::Listed(listed) => listed.iter().any(|known| known.name == name),
        }
    }

    /// Whether this version of it may be.
    #[must_use]
    pub fn admits_version(&self, name: &str, version: &Version) -> bool {
        match self {
            Self::None => false,
            Self::Any => true,
            Self::Listed(listed) => listed.iter().any(|known| known.name == name && known.versions.contains(version)),
        }
    }

    /// Reads what a caller wants installed.
    ///
    /// # Errors
    /// Each mistake with its field.
    pub fn choose(&self, asked: &[String]) -> Result<Vec<Requirement>, Vec<FieldError>> {
        if *self == Self::None && !asked.is_empty() {
            let message = "the template's packages policy is \"none\": nothing may be installed into its sessions";
            return Err(vec![FieldError::new("/packages", message)]);
        }
        if asked.len() > MAX_REQUIREMENTS {
            let message = format!("{} packages; allowed are {MAX_REQUIREMENTS}", asked.len());
            return Err(vec![FieldError::new("/packages", message)]);
        }
        let (mut chosen, mut errors) = (Vec::new(), Vec::new());
        for (at, text) in asked.iter().enumerate() {
            match Requirement::parse(text).and_then(|wanted| self.permit(wanted)) {
                Ok(wanted) => chosen.push(wanted),
                Err(message) => errors.push(FieldError::new(format!("/packages/{at}"), message)),
            }
        }
        if errors.is_empty() { Ok(chosen) } else { Err(errors) }
    }

    /// Versions that are listed are kept to by what is asked of the index.
    fn permit(&self, wanted: Requirement) -> Result<Requirement, String> {
        match self.admits(&wanted.name) {
            true => Ok(wanted),
            false => {
                Err(format!("\"{}\" is not among what the template's packages policy permits: {self}", wanted.name))
            }
        }
    }
}

/// Where packages come from: an index that speaks JSON (PEP 691) over TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    /// The index's host.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// Its path, from a slash on, without one at its end.
    pub path: String,
    /// Hosts that its files are at, beside its own; each asked at port 443.
    pub file_hosts: Vec<String>,
}

impl Index {
    /// Whether a file may be fetched there.
    #[must_use]
    pub fn has_files_at(&self, host: &str, port: u16) -> bool {
        (host == self.host && port == self.port) || (port == 443 && self.file_hosts.iter().any(|known| known == host))
    }
}

/// Reads the name of a host that files come from.
///
/// # Errors
/// What is wrong with it.
pub fn file_host(text: &str) -> Result<String, String> {
    match Host::parse(text) {
        Ok(host @ Host::Name(_)) if host.why_not_outside().is_none() => Ok(host.to_string()),
        Ok(host) => Err(format!("{host} is no name of the internet")),
        Err(why) => Err(why.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn listed(texts: &[&str]) -> PackagePolicy {
        PackagePolicy::Listed(texts.iter().map(|text| Requirement::parse(text).unwrap()).collect())
    }

    #[test]
    fn requirements_are_read_and_written_in_one_spelling() {
        for (text, expected) in [
            ("polars", "polars"),
            ("Ruamel.Yaml", "ruamel-yaml"),
            ("a__b--c..d", "a-b-c-d"),
            ("numpy>=2,<3", "numpy>=2,<3"),
            ("httpx[HTTP2,cli]==0.28.*", "httpx[cli,http2]==0.28.*"),
            ("x~=1.4.2", "x~=1.4.2"),
            ("x==1!2.0.post1.dev3+local.1", "x==1!2.0.post1.dev3+local.1"),
            ("0", "0"),
        ] {
            assert_eq!(Requirement::parse(text).unwrap().to_string(), expected);
        }
    }

    #[test]
    fn nothing_is_smuggled_through_a_name() {
        for text in [
            "",
            "-",
            "-r",
            "--index-url=https://evil.org",
            "-e.",
            "-ehttps://x",
            "a -b",
            "a\n--pre",
            "a\t",
            " a",
            "a ",
            "a;python_version>'3'",
            "a @ https://x/y.whl",
            "a@https://x",
            "https://x/y.whl",
            "git+https://x",
            "file:///etc/passwd",
            "./a",
            "a/b",
            "../a",
            "a.whl/",
            ".",
            "a[",
            "a]",
            "a[]",
            "a[-x]",
            "a[b",
            "a[b]c",
            "a[b][c]",
            "a===1",
            "a=1",
            "a==",
            "a==1 ",
            "a>=1,",
            "a>=x",
            "a==1;b",
            "a(==1)",
            "a#b",
            "a%20b",
            "a\0",
            "é",
            "a==1/../..",
            "{a}",
            "$a",
            "`a`",
            "a|b",
            "a&b",
            "a=='1'",
            "a-",
            "a_",
            "_a",
            "a==1@x",
        ] {
            let read = Requirement::parse(text);
            assert!(read.is_err(), "{text:?} is read as {read:?}");
        }
        assert!(Requirement::parse(&"a".repeat(101)).is_err());
    }

    #[test]
    fn a_list_admits_what_is_on_it() {
        let policy = listed(&["numpy>=2", "polars"]);
        let version = |text: &str| Version::from_str(text).unwrap();
        assert!(policy.admits("numpy") && policy.admits_version("numpy", &version("2.1")));
        assert!(!policy.admits_version("numpy", &version("1.26")));
        assert!(!policy.admits("scipy") && !PackagePolicy::None.admits("numpy") && PackagePolicy::Any.admits("scipy"));
        let mistakes = policy.choose(&["NumPy==2.1".into(), "scipy".into(), "--pre".into()]).unwrap_err();
        assert_eq!(mistakes.iter().map(|m| m.pointer.as_str()).collect::<Vec<_>>(), ["/packages/1", "/packages/2"]);
        assert!(mistakes[0].message.contains("numpy>=2 polars"), "{mistakes:?}");
        assert!(PackagePolicy::None.choose(&["x".into()]).unwrap_err()[0].message.contains("\"none\""));
        assert!(PackagePolicy::Any.choose(&vec!["x".to_owned(); 65]).is_err());
    }

    #[test]
    fn wheels_tell_what_they_are() {
        let of = |file| of_wheel(file).map(|(name, version)| format!("{name} {version}"));
        assert_eq!(of("Tiny_Cell-1.0-py3-none-any.whl").as_deref(), Some("tiny-cell 1.0"));
        assert_eq!(of("a-1.0-1-cp311-cp311-manylinux_2_17_x86_64.whl").as_deref(), Some("a 1.0"));
        for file in [
            "a-1.0.tar.gz",
            "a-x-py3-none-any.whl",
            "a-1.0-any.whl",
            "-1.0-py3-none-any.whl",
            "../a-1.0-py3-none-any.whl",
            "a-1.0-py3-none-any.whl.metadata",
        ] {
            assert_eq!(of(file), None, "{file}");
        }
    }

    proptest! {
        #[test]
        fn whatever_is_read_is_an_argument_that_is_read_again_as_the_same(text in "[a-zA-Z0-9._\\-\\[\\],<>=!~*+ ;@/:#-]{0,40}|\\PC{0,20}|[a-z]{1,5}(\\[[a-z,]{0,5}\\])?[<>=~!]{0,2}[0-9.*]{0,6}") {
            if let Ok(read) = Requirement::parse(&text) {
                let written = read.to_string();
                prop_assert!(written.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit()), "{}", written);
                prop_assert!(!written.contains([' ', '/', ':', '@', ';', '#', '\'', '"', '\\', '\n', '\0', '$', '%']), "{}", written);
                prop_assert_eq!(Requirement::parse(&written).unwrap(), read);
            }
        }
    }
}
