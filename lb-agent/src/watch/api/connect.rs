//! How to reach the API server: from a kubeconfig, from inside the cluster, or by URL.
//!
//! It sends nothing. If the server is down, the watch notices it and retries.

use std::{env, error::Error, path::PathBuf, time::Duration};

use kube::{
    Client, Config,
    client::ClientBuilder,
    config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError},
};

use super::liveness::{Liveness, Proofs};

/// How long to wait for a connection, so that an unreachable server is soon reported.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// The advice if the in-cluster address does not answer.
const ADVICE: &str = "in-cluster configuration names a ClusterIP, which does not work before \
    this agent serves it: give --master URL, or set KUBERNETES_SERVICE_HOST to an address of the \
    API server itself";

/// Where the API server is and how to log in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// A kubeconfig file, or several separated by colons; none: in-cluster.
    pub kubeconfig: Option<PathBuf>,
    /// Overrides the server's URL.
    pub master: Option<String>,
}

/// A client, and the advice to log if its server is not reachable.
#[derive(Clone)]
pub struct Connection {
    /// The client.
    pub client: Client,
    url: String,
    advice: Option<&'static str>,
    liveness: Liveness,
}

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The kubeconfig is missing or not valid.
    #[error("cannot use kubeconfig {}: correct --kubeconfig (or KUBECONFIG): {reason}", path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// The reason, in one line.
        reason: String,
    },
    /// No kubeconfig and not inside a cluster.
    #[error(
        "no API server to watch: give --kubeconfig FILE or --master URL, or --manifests DIR to \
         work without one; in-cluster configuration is not usable"
    )]
    NotInCluster(#[source] InClusterError),
    /// `--master` is not a URL.
    #[error("--master {master:?} is not a URL such as https://192.0.2.1:6443: {reason}")]
    Master {
        /// The URL.
        master: String,
        /// The reason.
        reason: String,
    },
    /// Credentials or certificates are not usable.
    #[error("cannot use the credentials for {url}")]
    Client {
        /// The server.
        url: String,
        /// The reason.
        source: Box<kube::Error>,
    },
}

impl Connection {
    /// The connection of a ready client.
    pub fn new(client: Client, url: &str) -> Self {
        Self { client, url: url.to_owned(), advice: None, liveness: Liveness::default() }
    }

    /// The server's URL.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Which watches are broken.
    pub fn liveness(&self) -> &Liveness {
        &self.liveness
    }

    /// What to try when the server is not reachable.
    pub fn advice(&self) -> Option<&'static str> {
        self.advice
    }
}

/// Makes a client, without contacting the server.
///
/// # Errors
/// If the configuration is missing or wrong, with what to do about it.
pub async fn connect(options: &Options) -> Result<Connection, ConnectError> {
    let mut advice = None;
    let mut config = match (&options.kubeconfig, &options.master) {
        (Some(path), _) => from_kubeconfig(path).await.map_err(|error| {
            ConnectError::Kubeconfig { path: path.clone(), reason: in_one_line(&error) }
        })?,
        (None, master) => match (Config::incluster(), master) {
            (Ok(config), None) => {
                advice = Some(ADVICE);
                config
            }
            (Ok(config), Some(_)) => config,
            (Err(_), Some(_)) => Config::new(axum::http::Uri::default()),
            (Err(source), None) => return Err(ConnectError::NotInCluster(source)),
        },
    };
    if let Some(master) = &options.master {
        config.cluster_url = url(master)?;
    }
    config.connect_timeout = Some(CONNECT_TIMEOUT);
    let url = config.cluster_url.to_string();
    let liveness = Liveness::default();
    let client = ClientBuilder::try_from(config)
        .map_err(|source| ConnectError::Client { url: url.clone(), source: Box::new(source) })?
        .with_layer(&Proofs(liveness.clone()))
        .build();
    Ok(Connection { client, url, advice, liveness })
}

/// The error and its causes in one line, without causes that an earlier one repeats, and
/// without the source snippet of a YAML parser.
fn in_one_line(error: &KubeconfigError) -> String {
    let mut text = String::new();
    let mut next: Option<&dyn Error> = Some(error);
    while let Some(error) = next {
        let message = error.to_string();
        let line = message.lines().next().unwrap_or_default().trim_end_matches(':');
        if text.is_empty() {
            line.clone_into(&mut text);
        } else if !text.contains(line) {
            text = format!("{text}: {line}");
        }
        next = error.source();
    }
    text
}

fn url(master: &str) -> Result<axum::http::Uri, ConnectError> {
    let wrong = |reason: String| ConnectError::Master { master: master.to_owned(), reason };
    let uri: axum::http::Uri =
        master.parse().map_err(|error: axum::http::uri::InvalidUri| wrong(error.to_string()))?;
    match (uri.scheme_str(), uri.host()) {
        (Some("http" | "https"), Some(_)) => Ok(uri),
        _ => Err(wrong("it needs http:// or https:// and a host".to_owned())),
    }
}

async fn from_kubeconfig(paths: &PathBuf) -> Result<Config, KubeconfigError> {
    let mut merged: Option<Kubeconfig> = None;
    for path in env::split_paths(paths) {
        let next = Kubeconfig::read_from(path)?;
        merged = Some(match merged {
            None => next,
            Some(first) => first.merge(next)?,
        });
    }
    let kubeconfig = merged.ok_or(KubeconfigError::FindPath)?;
    Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn failure(options: Options) -> String {
        let Err(error) = connect(&options).await else { panic!("{options:?} is refused") };
        match error.source() {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        }
    }

    #[tokio::test]
    async fn a_missing_or_wrong_kubeconfig_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config");
        let options = Options { kubeconfig: Some(path.clone()), master: None };
        let text = failure(options.clone()).await;
        assert!(text.contains(path.to_str().unwrap()) && text.contains("--kubeconfig"), "{text}");
        for malformed in ["clusters: 7", "clusters: ["] {
            std::fs::write(&path, malformed).unwrap();
            let text = failure(options.clone()).await;
            assert!(text.contains("failed to parse kubeconfig"), "{text}");
            assert_eq!(text.lines().count(), 1, "{text}");
        }
    }

    #[tokio::test]
    async fn outside_a_cluster_the_error_says_what_to_give() {
        let text = failure(Options::default()).await;
        assert!(text.contains("--kubeconfig") && text.contains("--master"), "{text}");
    }

    #[tokio::test]
    async fn master_overrides_the_url_and_must_be_one() {
        let options = |master: &str| Options { kubeconfig: None, master: Some(master.to_owned()) };
        let connection = connect(&options("http://127.0.0.1:8080")).await.unwrap();
        assert_eq!(connection.url(), "http://127.0.0.1:8080/");
        for wrong in ["127.0.0.1:8080", "ftp://host", "http://"] {
            let text = failure(options(wrong)).await;
            assert!(text.contains("--master"), "{wrong}: {text}");
        }
    }
}
