//! The client of one API server: TLS, proxies and timeouts.
//!
//! Invariant: nothing is repeated here. An error goes to whoever asked, who tries the next
//! server and logs why.

use std::time::Duration;

use axum::http::Uri;
use hyper_rustls::{FixedServerNameResolver, HttpsConnector, HttpsConnectorBuilder};
use hyper_timeout::TimeoutConnector;
use hyper_util::{
    client::{
        legacy::{
            Client as HttpClient,
            connect::{
                Connection, HttpConnector,
                proxy::{SocksV5, Tunnel},
            },
        },
        proxy::matcher::{Intercept, Matcher},
    },
    rt::{TokioExecutor, TokioTimer},
};
use kube::{
    Client, Config,
    client::{Body, ConfigExt},
};
use tokio::{net::lookup_host, time::timeout};
use tower::{BoxError, Service, ServiceBuilder};

/// How long to wait for a connection, with its TLS handshake, so that the next server is soon
/// tried.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A silent connection is probed after so long, and again so often.
const KEEPALIVE: Duration = Duration::from_secs(15);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// A server that acknowledges nothing for so long is gone: a watch on it breaks.
const UNACKNOWLEDGED: Duration = Duration::from_secs(30);

/// The HTTP proxies of the environment, read like Go's programs do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Proxies {
    /// `HTTPS_PROXY`: for servers at `https://`.
    pub https: String,
    /// `HTTP_PROXY`: for servers at `http://`.
    pub http: String,
    /// `NO_PROXY`: names, addresses and CIDRs that are reached without one.
    pub excluded: String,
}

impl Proxies {
    /// The proxies that the variables of the environment name; upper case wins.
    pub fn from_environment(variable: impl Fn(&str) -> Option<String>) -> Self {
        let either = |name: &str| {
            let set = |name: &str| variable(name).filter(|value| !value.is_empty());
            set(name).or_else(|| set(&name.to_lowercase())).unwrap_or_default()
        };
        Self {
            https: either("HTTPS_PROXY"),
            http: either("HTTP_PROXY"),
            excluded: either("NO_PROXY"),
        }
    }

    /// The proxy for a server; none if it is reached directly. As in Go, loopback addresses
    /// always are.
    fn of(&self, server: &Uri) -> Option<Intercept> {
        let host = server.host().unwrap_or_default().trim_matches(['[', ']']);
        let is_loopback = host == "localhost"
            || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback());
        if is_loopback {
            return None;
        }
        let matcher = Matcher::builder()
            .https(self.https.as_str())
            .http(self.http.as_str())
            .no(self.excluded.as_str());
        matcher.build().intercept(server)
    }

    /// The variable and the value of the proxy by which a server would be reached, if the agent
    /// cannot use it.
    pub(super) fn unusable(&self, server: &Uri) -> Option<(&'static str, &str)> {
        let (variable, proxy) = match server.scheme_str() {
            Some("https") => ("HTTPS_PROXY", self.https.as_str()),
            _ => ("HTTP_PROXY", self.http.as_str()),
        };
        // A matcher takes a proxy of an unknown kind for none.
        let any = "http://192.0.2.1".to_owned();
        let known = Self { https: any.clone(), http: any, excluded: self.excluded.clone() };
        let is_meant = !proxy.is_empty() && known.of(server).is_some();
        (is_meant && !is_usable(proxy)).then_some((variable, proxy))
    }
}

/// The schemes of proxies that the agent can use.
const SCHEMES: [&str; 4] = ["http", "https", "socks5", "socks5h"];

/// Whether the agent can use a proxy. Without a scheme it is an HTTP proxy, as in Go.
pub(super) fn is_usable(proxy: &str) -> bool {
    let scheme = proxy.split_once("://").map_or("http", |(scheme, _)| scheme);
    let uri: Result<Uri, _> = proxy.parse();
    SCHEMES.contains(&scheme.to_lowercase().as_str())
        && uri.is_ok_and(|uri| uri.host().is_some_and(|host| !host.is_empty()))
}

/// The proxy that a kubeconfig names for its cluster.
pub(super) fn named(proxy: &str, server: &Uri) -> Option<Intercept> {
    Matcher::builder().all(proxy).build().intercept(server)
}

/// Resolves the name of a server that is reached directly, so that a failure is told as what it
/// is.
pub(super) async fn resolve(
    server: &Uri,
    named: Option<&Intercept>,
    proxies: &Proxies,
) -> Result<(), String> {
    let host = server.host().unwrap_or_default().trim_matches(['[', ']']);
    let is_address = host.parse::<std::net::IpAddr>().is_ok();
    if is_address || named.is_some() || proxies.of(server).is_some() {
        return Ok(());
    }
    let found = timeout(CONNECT_TIMEOUT, lookup_host((host, 0))).await;
    match found {
        // A resolver that finds nothing says so by an error.
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(format!("the name {host} does not resolve: {error}")),
        Err(_) => Err(format!(
            "the name {host} does not resolve within {CONNECT_TIMEOUT:?}: make the node's \
             resolver reachable, or give the server's address"
        )),
    }
}

/// A client of the server at `config.cluster_url`, through `named` or else a proxy of the
/// environment. It sends nothing.
pub(super) fn client(
    config: &Config,
    named: Option<Intercept>,
    proxies: &Proxies,
) -> Result<Client, kube::Error> {
    let http = connector();
    let Some(proxy) = named.or_else(|| proxies.of(&config.cluster_url)) else {
        return with_connector(config, http);
    };
    let uri = proxy.uri().clone();
    match uri.scheme_str() {
        Some("socks5" | "socks5h") => {
            let mut socks =
                SocksV5::new(uri.clone(), http).local_dns(uri.scheme_str() == Some("socks5"));
            if let Some((user, password)) = proxy.raw_auth() {
                socks = socks.with_auth(user.to_owned(), password.to_owned());
            }
            with_connector(config, socks)
        }
        Some("https") => {
            // The proxy has a certificate of its own, which the system's authorities sign.
            let own = Config::new(uri.clone());
            let tunnel = Tunnel::new(uri, own.rustls_https_connector_with_connector(http)?);
            with_connector(config, authorized(tunnel, &proxy))
        }
        _ => with_connector(config, authorized(Tunnel::new(uri, http), &proxy)),
    }
}

fn authorized<C>(tunnel: Tunnel<C>, proxy: &Intercept) -> Tunnel<C> {
    match proxy.basic_auth() {
        Some(credentials) => tunnel.with_auth(credentials.clone()),
        None => tunnel,
    }
}

fn connector() -> HttpConnector {
    let mut http = HttpConnector::new();
    http.enforce_http(false);
    http.set_nodelay(true);
    http.set_keepalive(Some(KEEPALIVE));
    http.set_keepalive_interval(Some(KEEPALIVE_INTERVAL));
    http.set_keepalive_retries(Some(3));
    http.set_tcp_user_timeout(Some(UNACKNOWLEDGED));
    http
}

fn with_connector<C>(config: &Config, connector: C) -> Result<Client, kube::Error>
where
    C: Service<Uri> + Clone + Send + Sync + 'static,
    C::Response: Connection + hyper::rt::Read + hyper::rt::Write + Send + Unpin + 'static,
    C::Future: Send + 'static,
    C::Error: std::error::Error + Send + Sync + 'static,
{
    let mut timed = TimeoutConnector::new(https(config, connector)?);
    timed.set_connect_timeout(Some(CONNECT_TIMEOUT));
    let http: HttpClient<_, Body> = HttpClient::builder(TokioExecutor::new())
        .timer(TokioTimer::new())
        .http2_keep_alive_interval(KEEPALIVE)
        .http2_keep_alive_timeout(UNACKNOWLEDGED)
        .build(timed);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(http);
    Ok(Client::new(service, config.default_namespace.clone()))
}

/// TLS as kube has it, but with HTTP/2 where the server has it: all watches share one connection.
fn https<C>(config: &Config, connector: C) -> Result<HttpsConnector<C>, kube::Error> {
    let tls = config.rustls_client_config()?;
    let mut builder = HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http();
    if let Some(name) = &config.tls_server_name {
        let Ok(name) = name.clone().try_into() else {
            // It ends with the error that says so.
            return config.rustls_https_connector_with_connector(connector);
        };
        builder = builder.with_server_name_resolver(FixedServerNameResolver::new(name));
    }
    Ok(builder.enable_http1().enable_http2().wrap_connector(connector))
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    fn proxy_of(proxies: &Proxies, server: &str) -> Option<String> {
        proxies.of(&server.parse().unwrap()).map(|proxy| proxy.uri().to_string())
    }

    #[test]
    fn a_server_is_reached_through_the_proxy_unless_no_proxy_names_it() {
        let variables = |name: &str| match name {
            "https_proxy" => Some("http://192.0.2.9:3128".to_owned()),
            "HTTPS_PROXY" => Some(String::new()),
            "NO_PROXY" => Some("10.0.0.0/8, fd00::/8,.internal,192.0.2.1,".to_owned()),
            _ => None,
        };
        let proxies = Proxies::from_environment(variables);
        for direct in [
            "https://10.1.2.3:6443",
            "https://192.0.2.1:6443",
            "https://[fd00::1]:6443",
            "https://api.internal",
            "https://127.0.0.1:6444",
            "https://localhost:6443",
            "https://[::1]:6443",
            "http://192.0.2.2",
        ] {
            assert_eq!(proxy_of(&proxies, direct), None, "{direct}");
        }
        for through in ["https://192.0.2.2:6443", "https://api.example.com", "https://[fc00::1]"] {
            let proxy = proxy_of(&proxies, through);
            assert_eq!(proxy.as_deref(), Some("http://192.0.2.9:3128/"), "{through}");
        }
    }

    #[test]
    fn a_proxy_of_another_kind_is_not_usable() {
        for (proxy, expected) in [
            ("http://192.0.2.1:3128", true),
            ("HTTPS://me:secret@proxy.example", true),
            ("socks5h://[fd00::1]:1080", true),
            ("proxy.example:3128", true),
            ("socks4://192.0.2.1:1080", false),
            ("ftp://192.0.2.1", false),
            ("http://", false),
            ("a b", false),
        ] {
            assert_eq!(is_usable(proxy), expected, "{proxy}");
        }
        let proxies = Proxies {
            https: "socks4://192.0.2.1".to_owned(),
            excluded: "10.0.0.0/8".to_owned(),
            ..Proxies::default()
        };
        for (server, expected) in [
            ("https://192.0.2.2:6443", Some(("HTTPS_PROXY", "socks4://192.0.2.1"))),
            ("https://10.0.0.1:6443", None),
            ("http://192.0.2.2", None),
        ] {
            assert_eq!(proxies.unusable(&server.parse().unwrap()), expected, "{server}");
        }
    }

    #[tokio::test]
    async fn a_server_is_offered_http_2_and_http_1() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("https://{}", listener.local_addr().unwrap());
        let config = Config::new(url.parse().unwrap());
        let client = client(&config, None, &Proxies::default()).unwrap();
        let asking = tokio::spawn(async move { client.apiserver_version().await });
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut hello = vec![0; 4096];
        let length = stream.read(&mut hello).await.unwrap();
        let offered = b"\x02h2\x08http/1.1";
        assert!(hello[..length].windows(offered.len()).any(|window| window == offered));
        drop(stream);
        assert!(asking.await.unwrap().is_err());
    }

    #[test]
    fn every_kind_of_proxy_gives_a_client() {
        for proxy in ["http://p:3128", "https://p", "socks5://p:1080", "http://me:secret@p:1"] {
            let proxies = Proxies { https: proxy.to_owned(), ..Proxies::default() };
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let _inside = runtime.enter();
            let config = Config::new("https://192.0.2.2:6443".parse().unwrap());
            assert!(client(&config, None, &proxies).is_ok(), "{proxy}");
        }
    }
}
