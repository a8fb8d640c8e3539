//! What an API server was asked, by its audit log: one line for each request as it arrives.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::json;

/// The user that agents are.
pub const AGENT: &str = "system:serviceaccount:kube-system:lb-agent";
/// The user that kube-proxy is.
pub const KUBE_PROXY: &str = "system:kube-proxy";

/// The log of one API server.
#[derive(Debug)]
pub struct Audit {
    log: PathBuf,
    policy: PathBuf,
}

/// A request.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// When it arrived.
    pub at: Timestamp,
    /// `watch`, `list`, and so on.
    pub verb: String,
    /// Path and parameters.
    pub uri: String,
}

impl Request {
    /// Whether the answer has all objects of a kind.
    pub fn is_list(&self) -> bool {
        let is_probe = self.uri.contains("limit=1");
        self.uri.contains("sendInitialEvents=true") || (self.verb == "list" && !is_probe)
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    verb: String,
    #[serde(rename = "requestURI")]
    request_uri: String,
    request_received_timestamp: String,
    user: User,
}

#[derive(Deserialize)]
struct User {
    #[serde(default)]
    username: String,
}

impl Audit {
    /// A log in a directory, of the requests of agents and of kube-proxy alone.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn new(directory: &Path) -> Result<Self> {
        let policy = json!({
            "apiVersion": "audit.k8s.io/v1", "kind": "Policy",
            "omitStages": ["ResponseStarted", "ResponseComplete", "Panic"],
            "rules": [{"level": "Metadata", "users": [AGENT, KUBE_PROXY]}, {"level": "None"}],
        });
        let audit = Self { log: directory.join("audit.log"), policy: directory.join("policy") };
        fs::write(&audit.policy, policy.to_string()).context("cannot write the audit policy")?;
        Ok(audit)
    }

    /// The arguments of the API server.
    pub fn arguments(&self) -> Vec<String> {
        let (log, policy) = (self.log.display(), self.policy.display());
        vec![format!("--audit-log-path={log}"), format!("--audit-policy-file={policy}")]
    }

    /// The requests of a user so far.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn requests(&self, user: &str) -> Result<Vec<Request>> {
        let text = fs::read_to_string(&self.log);
        let text = text.with_context(|| format!("cannot read {}", self.log.display()))?;
        parse(&text, user)
    }
}

fn parse(text: &str, user: &str) -> Result<Vec<Request>> {
    let mut found = Vec::new();
    // The last line may be half there.
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    for line in whole.lines() {
        let line: Line =
            serde_json::from_str(line).with_context(|| format!("audit log: {line}"))?;
        if line.user.username == user {
            let at = line.request_received_timestamp.parse().context("audit log: a time")?;
            found.push(Request { at, verb: line.verb, uri: line.request_uri });
        }
    }
    Ok(found)
}

/// The most requests within one second of the clock.
pub fn most_in_a_second(requests: &[Request]) -> u64 {
    let mut seconds = BTreeMap::<i64, u64>::new();
    for request in requests {
        *seconds.entry(request.at.as_second()).or_default() += 1;
    }
    seconds.into_values().max().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(user: &str, second: u32, verb: &str, uri: &str) -> String {
        let at = format!("2026-01-01T00:00:{second:02}.500000Z");
        let value = json!({
            "verb": verb, "requestURI": uri, "requestReceivedTimestamp": at,
            "user": {"username": user}, "stage": "RequestReceived",
        });
        format!("{value}\n")
    }

    #[test]
    fn requests_are_those_of_one_user_and_counted_by_the_second() {
        let text = [
            line("a", 1, "list", "/api/v1/services?limit=1"),
            line("a", 2, "watch", "/x?sendInitialEvents=true&watch=true"),
            line("b", 2, "list", "/x"),
            line("a", 2, "list", "/x"),
            line("a", 2, "watch", "/x?watch=true"),
            "{\"half\":".to_owned(),
        ];
        let requests = parse(&text.concat(), "a").unwrap();
        let lists: Vec<_> = requests.iter().map(Request::is_list).collect();
        assert_eq!(lists, [false, true, true, false]);
        assert_eq!(most_in_a_second(&requests), 3);
        assert_eq!(most_in_a_second(&[]), 0);
    }
}
