//! Where the API servers are and how to log in: from a kubeconfig, from inside the cluster, or
//! by URL.
//!
//! It sends nothing. It is read again whenever a server is looked for, and whenever one of its
//! files has changed, so that what rotates is never older than on disk.

use std::{
    env,
    error::Error,
    fs,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use axum::http::Uri;
use kube::{
    Config,
    config::{Cluster, InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError},
};

use super::transport::{self, Proxies};
use crate::report::redacted;

/// The name that the certificate of every API server carries.
const SERVER_NAME: &str = "kubernetes.default.svc";

/// The advice if the in-cluster address does not answer.
const ADVICE: &str = "in-cluster configuration names the API server's ClusterIP, which no agent \
    serves at a first start: give --master URL[,URL...], or set KUBERNETES_SERVICE_HOST and \
    KUBERNETES_SERVICE_PORT to an address of the API server itself";

/// Where the API servers are and how to log in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// A kubeconfig file, or several separated by colons; none: in-cluster.
    pub kubeconfig: Option<PathBuf>,
    /// URLs of the servers, instead of the configured one; tried in this order.
    pub masters: Vec<String>,
    /// Where the learned servers are kept; none: nowhere.
    pub state_dir: Option<PathBuf>,
    /// HTTP proxies.
    pub proxies: Proxies,
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
    /// A proxy is not usable.
    #[error(
        "cannot use the proxy {url} of {source_name}: only http://, https:// and socks5:// are \
         known; correct it, or except the API server from it by NO_PROXY"
    )]
    Proxy {
        /// The URL, without a user and password.
        url: String,
        /// The variable, or the field of the kubeconfig.
        source_name: &'static str,
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

/// Servers and credentials as they are configured now.
#[derive(Clone, Debug)]
pub(super) struct Access {
    /// Everything but the server.
    config: Config,
    /// The servers, in the order in which they are tried.
    pub(super) given: Vec<Uri>,
    /// The proxy that the kubeconfig names.
    pub(super) proxy: Option<String>,
    /// What to try if no server answers.
    pub(super) advice: Option<&'static str>,
    /// The files that all of this was read from.
    files: Vec<PathBuf>,
    /// What the files held.
    fingerprint: u64,
}

/// A server that may answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Candidate {
    pub(super) url: Uri,
    /// It was learned from the cluster, not configured.
    pub(super) is_learned: bool,
}

impl Access {
    /// Reads the configuration and the files that it names.
    pub(super) async fn read(options: &Options) -> Result<Self, ConnectError> {
        let (mut files, mut proxy, mut advice) = (Vec::new(), None, None);
        let config = match &options.kubeconfig {
            Some(paths) => {
                let wrong = |error: KubeconfigError| ConnectError::Kubeconfig {
                    path: paths.clone(),
                    reason: in_one_line(&error),
                };
                files.extend(env::split_paths(paths));
                let kubeconfig = merged(&files).map_err(wrong)?;
                files.extend(named_files(&kubeconfig));
                proxy = cluster(&kubeconfig).and_then(|cluster| cluster.proxy_url.clone());
                let options = KubeConfigOptions::default();
                Config::from_custom_kubeconfig(kubeconfig, &options).await.map_err(wrong)?
            }
            None => match Config::incluster() {
                Ok(config) => {
                    advice = options.masters.is_empty().then_some(ADVICE);
                    config
                }
                Err(_) if !options.masters.is_empty() => Config::new(Uri::default()),
                Err(source) => return Err(ConnectError::NotInCluster(source)),
            },
        };
        let given: Vec<Uri> = match options.masters.as_slice() {
            [] => vec![config.cluster_url.clone()],
            masters => masters.iter().map(|master| url(master)).collect::<Result<_, _>>()?,
        };
        let proxy = proxy.filter(|proxy| !proxy.is_empty());
        check_proxies(&given, proxy.as_deref(), &options.proxies)?;
        let fingerprint = fingerprint(&files);
        Ok(Self { config, given, proxy, advice, files, fingerprint })
    }

    /// Whether a file holds something else than when it was read; then what they hold now.
    pub(super) fn changed(&self) -> Option<u64> {
        let now = fingerprint(&self.files);
        (now != self.fingerprint).then_some(now)
    }

    /// The servers in the order of trial: `last`, which answered before, the configured ones,
    /// the learned ones; and after all others `failed`.
    pub(super) fn candidates(
        &self,
        learned: &[SocketAddr],
        last: Option<&str>,
        failed: Option<&Uri>,
    ) -> Vec<Candidate> {
        let mut all: Vec<Candidate> = Vec::new();
        let given = self.given.iter().map(|url| Candidate { url: url.clone(), is_learned: false });
        // Without TLS an address would be all that a server needs to be trusted.
        let is_secure = self.given.iter().all(|url| url.scheme_str() == Some("https"));
        let learned = learned.iter().filter(|_| is_secure);
        let learned = learned.filter_map(|endpoint| format!("https://{endpoint}").parse().ok());
        let learned = learned.map(|url| Candidate { url, is_learned: true });
        for candidate in given.chain(learned) {
            if !all.iter().any(|other| is_same(&other.url, &candidate.url)) {
                all.push(candidate);
            }
        }
        let place = |is_meant: &dyn Fn(&Uri) -> bool| {
            all.iter().position(|candidate| is_meant(&candidate.url))
        };
        if let Some(place) = failed.and_then(|failed| place(&|url| url == failed)) {
            all.rotate_left(place + 1);
        } else if let Some(place) = last.and_then(|last| place(&|url| *url == *last)) {
            all[..=place].rotate_right(1);
        }
        all
    }

    /// The configuration of a client of this server.
    pub(super) fn config(&self, candidate: &Candidate) -> Config {
        let mut config = self.config.clone();
        config.cluster_url = candidate.url.clone();
        // Retries belong to the watch, which says why and may ask another server.
        config.default_retry = false;
        if candidate.is_learned && config.tls_server_name.is_none() {
            config.tls_server_name = Some(self.server_name());
        }
        config
    }

    /// The name that a learned server must prove by its certificate, since its address may not
    /// be in it.
    fn server_name(&self) -> String {
        let host = self.given.first().and_then(Uri::host).unwrap_or_default();
        let is_address = host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok();
        if is_address || host.is_empty() || host == "localhost" {
            SERVER_NAME.to_owned()
        } else {
            host.to_owned()
        }
    }
}

/// Refuses a proxy of a kind that the agent cannot use, if a server would be reached by it.
fn check_proxies(
    servers: &[Uri],
    named: Option<&str>,
    proxies: &Proxies,
) -> Result<(), ConnectError> {
    let unusable = match named {
        Some(proxy) => (!transport::is_usable(proxy)).then_some(("proxy-url", proxy)),
        None => servers.iter().find_map(|server| proxies.unusable(server)),
    };
    unusable.map_or(Ok(()), |(source_name, proxy)| {
        Err(ConnectError::Proxy { url: redacted(proxy), source_name })
    })
}

/// Whether two URLs lead to one server.
fn is_same(one: &Uri, other: &Uri) -> bool {
    let port = |url: &Uri| {
        url.port_u16().or(match url.scheme_str() {
            Some("https") => Some(443),
            _ => Some(80),
        })
    };
    (one.scheme(), one.host(), port(one)) == (other.scheme(), other.host(), port(other))
}

fn fingerprint(files: &[PathBuf]) -> u64 {
    let mut hasher = DefaultHasher::new();
    for file in files {
        fs::read(file).ok().hash(&mut hasher);
    }
    hasher.finish()
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

fn url(master: &str) -> Result<Uri, ConnectError> {
    let wrong = |reason: String| ConnectError::Master { master: master.to_owned(), reason };
    let uri: Uri =
        master.parse().map_err(|error: axum::http::uri::InvalidUri| wrong(error.to_string()))?;
    match (uri.scheme_str(), uri.host()) {
        (Some("http" | "https"), Some(_)) => Ok(uri),
        _ => Err(wrong("it needs http:// or https:// and a host".to_owned())),
    }
}

fn merged(paths: &[PathBuf]) -> Result<Kubeconfig, KubeconfigError> {
    let mut merged: Option<Kubeconfig> = None;
    for path in paths {
        let next = Kubeconfig::read_from(path)?;
        merged = Some(match merged {
            None => next,
            Some(first) => first.merge(next)?,
        });
    }
    merged.ok_or(KubeconfigError::FindPath)
}

/// The cluster of the current context.
fn cluster(kubeconfig: &Kubeconfig) -> Option<&Cluster> {
    let name = &context(kubeconfig)?.cluster;
    kubeconfig.clusters.iter().find(|cluster| cluster.name == *name)?.cluster.as_ref()
}

fn context(kubeconfig: &Kubeconfig) -> Option<&kube::config::Context> {
    let name = kubeconfig.current_context.as_ref()?;
    kubeconfig.contexts.iter().find(|context| context.name == *name)?.context.as_ref()
}

/// The files that the current context of a kubeconfig names.
fn named_files(kubeconfig: &Kubeconfig) -> Vec<PathBuf> {
    let user = context(kubeconfig).and_then(|context| context.user.as_ref());
    let mut users = kubeconfig.auth_infos.iter();
    let user = user.and_then(|name| users.find(|user| user.name == *name)?.auth_info.as_ref());
    let of_user = user.map(|user| [&user.token_file, &user.client_certificate, &user.client_key]);
    let of_cluster = cluster(kubeconfig).map(|cluster| &cluster.certificate_authority);
    let named = of_user.into_iter().flatten().chain(of_cluster);
    named.flatten().map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests;
