//! Which API server gets the requests.
//!
//! The servers are tried in turn; the first that lists Services for the agent's credentials gets
//! all requests until it fails one. A server that answers but cannot serve counts as down, just
//! as one that does not answer. Invariant: a request is sent at most once, so that whoever sent
//! it sees each error.

use std::{
    collections::BTreeMap,
    error::Error,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use axum::http::{Request, Response, StatusCode, Uri};
use hyper_util::client::proxy::matcher::Intercept;
use kube::{Client, client::Body};
use tokio::time::{error::Elapsed, timeout};
use tower::{
    BoxError,
    util::{BoxCloneService, service_fn},
};

use super::{
    access::{Access, Candidate, ConnectError, Options},
    learned::Learned,
    pause::Pause,
    transport::{self, CONNECT_TIMEOUT},
};

/// What a server must answer before it gets requests: what the agent needs most, in its smallest
/// form.
const PROBE: &str = "/api/v1/services?limit=1";
/// How long a server may take for that.
const PROBE_TIMEOUT: Duration = Duration::from_secs(10);

/// A service that sends requests to a server.
pub(super) type Requests = BoxCloneService<Request<Body>, Response<Body>, BoxError>;

/// The servers and the one in use.
pub(super) struct Servers {
    options: Options,
    learned: Learned,
    state: Mutex<State>,
    /// Held while a server is looked for.
    rounds: tokio::sync::Mutex<Rounds>,
}

struct State {
    access: Arc<Access>,
    current: Option<Arc<Server>>,
    /// The server that was in use and failed.
    failed: Option<Uri>,
    /// What the files held that could not be used.
    rejected: Option<u64>,
    /// Why each server is down, as the log says.
    down: BTreeMap<String, String>,
}

struct Server {
    candidate: Candidate,
    client: Client,
    access: Arc<Access>,
}

/// The rounds in which all servers are tried.
#[derive(Default)]
struct Rounds {
    pause: Pause,
    /// What the last one ended with, until when that is the answer.
    failure: Option<(NoServer, Instant)>,
}

/// No server can serve.
#[derive(Clone, Debug, thiserror::Error)]
#[error("no API server serves: {text}")]
struct NoServer {
    text: String,
    /// One of them answered, and may be overloaded.
    has_answered: bool,
}

/// Why a server is down.
struct Down {
    error: String,
    has_answered: bool,
}

impl Servers {
    /// The servers of `access`. Contacts none.
    pub(super) fn new(
        options: Options,
        access: Access,
        learned: Learned,
    ) -> Result<Self, ConnectError> {
        for url in &access.given {
            let candidate = Candidate { url: url.clone(), is_learned: false };
            client(&access, &candidate, &options).map_err(|source| ConnectError::Client {
                url: url.to_string(),
                source: Box::new(source),
            })?;
        }
        let state = State {
            access: Arc::new(access),
            current: None,
            failed: None,
            rejected: None,
            down: BTreeMap::new(),
        };
        Ok(Self {
            options,
            learned,
            state: Mutex::new(state),
            rounds: tokio::sync::Mutex::default(),
        })
    }

    /// The service that sends each request to the server in use.
    pub(super) fn service(servers: &Arc<Self>) -> Requests {
        let servers = Arc::clone(servers);
        Requests::new(service_fn(move |request| {
            let servers = Arc::clone(&servers);
            async move { servers.send(request).await }
        }))
    }

    /// The server in use, or those that are configured.
    pub(super) fn described(&self) -> String {
        let state = self.state();
        match &state.current {
            Some(server) => server.candidate.url.to_string(),
            None => {
                let given: Vec<_> = state.access.given.iter().map(Uri::to_string).collect();
                given.join(",")
            }
        }
    }

    /// The servers that are configured.
    pub(super) fn given(&self) -> Vec<Uri> {
        self.state().access.given.clone()
    }

    /// What to try if no server answers.
    pub(super) fn advice(&self) -> Option<&'static str> {
        self.state().access.advice
    }

    async fn send(&self, request: Request<Body>) -> Result<Response<Body>, BoxError> {
        let server = self.server().await?;
        let is_needed = is_needed(request.uri().path());
        let answer = server.client.send(request).await;
        match &answer {
            Err(error) => self.failed(&server, &reason(error)),
            Ok(answer) if is_down(answer.status(), is_needed) => {
                self.failed(&server, &answer.status().to_string());
            }
            Ok(_) => {}
        }
        Ok(answer?)
    }

    /// The server in use; looks for one if there is none.
    async fn server(&self) -> Result<Arc<Server>, BoxError> {
        if let Some(server) = self.refreshed().await {
            return Ok(server);
        }
        let mut rounds = self.rounds.lock().await;
        let current = self.state().current.clone();
        if let Some(server) = current {
            return Ok(server);
        }
        if let Some((error, until)) = &rounds.failure
            && Instant::now() < *until
        {
            return Err(error.clone().into());
        }
        match self.find().await {
            Ok(server) => {
                *rounds = Rounds::default();
                Ok(server)
            }
            Err(error) => {
                let longest = if error.has_answered { Pause::LONGEST } else { Pause::UNREACHABLE };
                let until = Instant::now() + rounds.pause.next(longest);
                rounds.failure = Some((error.clone(), until));
                Err(error.into())
            }
        }
    }

    /// The server in use, with the credentials that are on disk now.
    async fn refreshed(&self) -> Option<Arc<Server>> {
        let (server, rejected) = {
            let state = self.state();
            (state.current.clone()?, state.rejected)
        };
        let Some(found) = server.access.changed().filter(|found| Some(*found) != rejected) else {
            return Some(server);
        };
        let access = Access::read(&self.options).await.map_err(|error| error.to_string());
        let renewed = access.and_then(|access| {
            let client = client(&access, &server.candidate, &self.options);
            Ok((client.map_err(|error| reason(&error))?, Arc::new(access)))
        });
        match renewed {
            Ok((client, access)) => {
                tracing::info!(
                    "the credentials for the API server have changed: using the new ones"
                );
                let candidate = server.candidate.clone();
                let renewed = Arc::new(Server { candidate, client, access: Arc::clone(&access) });
                let mut state = self.state();
                state.access = access;
                if state.current.as_ref().is_some_and(|current| Arc::ptr_eq(current, &server)) {
                    state.current = Some(Arc::clone(&renewed));
                }
                Some(renewed)
            }
            Err(error) => {
                tracing::warn!(
                    error,
                    "the changed credentials for the API server are not usable: keeping those from before"
                );
                self.state().rejected = Some(found);
                Some(server)
            }
        }
    }

    /// Asks the servers in turn, until one serves.
    async fn find(&self) -> Result<Arc<Server>, NoServer> {
        let access = match Access::read(&self.options).await {
            Ok(access) => Arc::new(access),
            Err(error) => {
                tracing::debug!(%error, "cannot read the configuration again: using that from before");
                Arc::clone(&self.state().access)
            }
        };
        let failed = self.state().failed.clone();
        let last = self.learned.last();
        let endpoints = self.learned.endpoints();
        let (mut errors, mut has_answered) = (Vec::new(), false);
        for candidate in access.candidates(&endpoints, last.as_deref(), failed.as_ref()) {
            match self.probed(&access, &candidate).await {
                Ok(client) => {
                    let server = Arc::new(Server { candidate, client, access });
                    self.use_server(&server);
                    return Ok(server);
                }
                Err(down) => {
                    self.log_down(&candidate, &down.error);
                    errors.push(format!("{}: {}", candidate.url, down.error));
                    has_answered |= down.has_answered;
                }
            }
        }
        Err(NoServer { text: errors.join("; "), has_answered })
    }

    async fn probed(&self, access: &Access, candidate: &Candidate) -> Result<Client, Down> {
        let silent = |error| Down { error, has_answered: false };
        let failed = |error: kube::Error| Down {
            has_answered: matches!(error, kube::Error::Api(_)),
            error: reason(&error),
        };
        let client = client(access, candidate, &self.options).map_err(failed)?;
        let named = named(access, candidate);
        let resolved = transport::resolve(&candidate.url, named.as_ref(), &self.options.proxies);
        resolved.await.map_err(silent)?;
        let request =
            Request::get(PROBE).body(Vec::new()).map_err(|error| silent(error.to_string()))?;
        match timeout(PROBE_TIMEOUT, client.request_text(request)).await {
            Ok(Ok(_)) => Ok(client),
            Ok(Err(error)) => Err(failed(error)),
            Err(_) => Err(silent(format!("no answer in {PROBE_TIMEOUT:?}"))),
        }
    }

    fn use_server(&self, server: &Arc<Server>) {
        let Candidate { url, is_learned } = &server.candidate;
        self.learned.answered(url);
        let mut state = self.state();
        state.access = Arc::clone(&server.access);
        state.current = Some(Arc::clone(server));
        state.failed = None;
        state.rejected = None;
        state.down.remove(&url.to_string());
        tracing::info!(server = %url, learned = is_learned, "the API server answers: watching it");
    }

    /// A request failed: another server is looked for before the next one.
    fn failed(&self, server: &Arc<Server>, error: &str) {
        let mut state = self.state();
        if state.current.as_ref().is_some_and(|current| Arc::ptr_eq(current, server)) {
            let url = &server.candidate.url;
            tracing::warn!(server = %url, error, "the API server does not serve any more: trying the next one");
            state.current = None;
            state.failed = Some(url.clone());
            state.down.insert(url.to_string(), error.to_owned());
        }
    }

    /// Logs why a server is down, unless the log says it already.
    fn log_down(&self, candidate: &Candidate, error: &str) {
        let url = candidate.url.to_string();
        let mut state = self.state();
        if state.down.get(&url).map(String::as_str) != Some(error) {
            tracing::warn!(
                server = %url,
                error,
                learned = candidate.is_learned,
                "an API server cannot serve: trying the next one"
            );
            state.down.insert(url, error.to_owned());
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn client(
    access: &Access,
    candidate: &Candidate,
    options: &Options,
) -> Result<Client, kube::Error> {
    transport::client(&access.config(candidate), named(access, candidate), &options.proxies)
}

/// The proxy that the kubeconfig names.
fn named(access: &Access, candidate: &Candidate) -> Option<Intercept> {
    access.proxy.as_ref().and_then(|proxy| transport::named(proxy, &candidate.url))
}

/// Whether the agent cannot work without what is at this path.
fn is_needed(path: &str) -> bool {
    matches!(path.rsplit('/').next(), Some("services" | "endpointslices"))
}

/// Whether a server that answers with this status cannot serve. What the agent does without, it
/// may be refused.
fn is_down(status: StatusCode, is_needed: bool) -> bool {
    let is_refused = matches!(status, StatusCode::FORBIDDEN | StatusCode::NOT_FOUND);
    status.is_server_error() || status == StatusCode::UNAUTHORIZED || (is_needed && is_refused)
}

/// The status and the message of an answer, or the innermost cause of another error.
pub(super) fn reason(error: &kube::Error) -> String {
    if let kube::Error::Api(status) = error {
        return format!("{} {}", status.code, status.message);
    }
    let mut innermost: &dyn Error = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    // The connector's own limit, not the kernel's ETIMEDOUT.
    let limit = innermost.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    if limit.is_some_and(|limit| limit.is::<Elapsed>()) {
        return format!("no connection within {CONNECT_TIMEOUT:?}");
    }
    innermost.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_that_the_agent_can_do_nothing_with_counts_as_down() {
        for (status, needed, other) in [
            (200, false, false),
            (400, false, false),
            (401, true, true),
            (403, true, false),
            (404, true, false),
            (410, false, false),
            (422, false, false),
            (429, false, false),
            (500, true, true),
            (503, true, true),
        ] {
            let status = StatusCode::from_u16(status).unwrap();
            assert_eq!(
                (is_down(status, true), is_down(status, false)),
                (needed, other),
                "{status}"
            );
        }
        assert!(is_needed("/api/v1/services") && is_needed("/apis/x/v1/endpointslices"));
        assert!(!is_needed("/apis/networking.k8s.io/v1/servicecidrs"));
    }
}
