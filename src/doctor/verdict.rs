//! What was found, as lines for people and as JSON. Decides nothing but what all findings together are.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::cli::escape;

/// How good something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// A server works, with less than there could be.
    Weak,
    /// A server does not start, or sessions don't.
    Broken,
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Weak => "weak",
            Self::Broken => "broken",
        }
    }

    /// The exit status of a command that found this.
    #[must_use]
    pub fn exit_status(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Weak => 1,
            Self::Broken => 2,
        }
    }
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// What was looked at.
    pub name: String,
    /// How good it is.
    pub verdict: Verdict,
    /// What was seen.
    pub seen: String,
    /// What to do.
    pub remedy: Option<String>,
}

impl Check {
    /// As it should be.
    #[must_use]
    pub fn ok(name: impl Into<String>, seen: impl Into<String>) -> Self {
        Self { name: name.into(), verdict: Verdict::Ok, seen: seen.into(), remedy: None }
    }

    /// Less than there could be.
    #[must_use]
    pub fn weak(name: impl Into<String>, seen: impl Into<String>) -> Self {
        Self { verdict: Verdict::Weak, ..Self::ok(name, seen) }
    }

    /// What keeps a server or its sessions from working.
    #[must_use]
    pub fn broken(name: impl Into<String>, seen: impl Into<String>) -> Self {
        Self { verdict: Verdict::Broken, ..Self::ok(name, seen) }
    }

    /// The same with what to do.
    #[must_use]
    pub fn with(self, remedy: impl Into<String>) -> Self {
        Self { remedy: Some(remedy.into()), ..self }
    }
}

/// All findings.
#[derive(Debug, Clone, Default)]
pub struct Findings(Vec<Check>);

impl Findings {
    /// Adds one.
    pub fn add(&mut self, check: Check) {
        self.0.push(check);
    }

    /// Adds several.
    pub fn extend(&mut self, checks: impl IntoIterator<Item = Check>) {
        self.0.extend(checks);
    }

    /// As good as the worst of them.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        self.0.iter().map(|check| check.verdict).max().unwrap_or(Verdict::Ok)
    }

    /// A line each. Words from elsewhere are made harmless for a terminal.
    #[must_use]
    pub fn to_text(&self) -> String {
        let width = self.0.iter().map(|check| check.name.chars().count()).max().unwrap_or(0);
        let mut text = String::new();
        for Check { name, verdict, seen, remedy } in &self.0 {
            let remedy = remedy.as_ref().map(|remedy| format!(": {remedy}")).unwrap_or_default();
            let line = format!("{:6}  {name:width$}  {seen}{remedy}", verdict.word());
            // Writing to a string does not fail.
            let _ = writeln!(text, "{}", escape(&line.replace('\n', " ")));
        }
        text
    }

    /// `{"verdict", "checks": [{"name", "verdict", "seen", "remedy"}]}`.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let check =
            |c: &Check| json!({"name": c.name, "verdict": c.verdict.word(), "seen": c.seen, "remedy": c.remedy});
        json!({"verdict": self.verdict().word(), "checks": self.0.iter().map(check).collect::<Vec<_>>()})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_finding_is_a_line_and_the_worst_one_counts() {
        let mut findings = Findings::default();
        assert_eq!(findings.verdict().exit_status(), 0);
        findings.add(Check::ok("engine", "version 1"));
        findings.add(Check::weak("clock", "late").with("set it"));
        assert_eq!(findings.verdict().exit_status(), 1);
        findings.extend([Check::broken("memory (runc)", "no\nlimit \u{1b}[2J")]);
        assert_eq!(findings.verdict().exit_status(), 2);
        let text = "ok      engine         version 1\n\
                    weak    clock          late: set it\n\
                    broken  memory (runc)  no limit \\u{1b}[2J\n";
        assert_eq!(findings.to_text(), text);
        let json = findings.to_json();
        assert_eq!(json["verdict"], "broken");
        assert_eq!(json["checks"][1], json!({"name": "clock", "verdict": "weak", "seen": "late", "remedy": "set it"}));
        assert_eq!(json["checks"][0]["remedy"], Value::Null);
    }
}
