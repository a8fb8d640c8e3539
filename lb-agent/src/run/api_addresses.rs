//! The addresses of the API servers that the agent is configured with: no Service may have one, or
//! connections of this node to the API server, the agent's own among them, would go to its pods.

use std::{collections::BTreeSet, net::IpAddr, time::Duration};

use axum::http::Uri;
use lb_control::desired::taken::ApiServers;
use tokio::{
    net::lookup_host,
    sync::watch,
    time::{interval, timeout},
};

/// How often names are looked up again.
const AGAIN: Duration = Duration::from_secs(60);
/// How long a look-up may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// The servers whose URLs have an address for a host.
pub(super) fn literal(urls: &[Uri]) -> ApiServers {
    let addresses = urls.iter().filter_map(|url| {
        let host = url.host()?.trim_matches(['[', ']']);
        Some((host.parse::<IpAddr>().ok()?, port(url)))
    });
    addresses.collect()
}

/// Keeps `servers` up to date with what the names in the URLs stand for. An address stays until a
/// look-up succeeds without it.
pub(super) async fn follow(urls: Vec<Uri>, servers: watch::Sender<ApiServers>) {
    let literal = literal(&urls);
    let names: Vec<(String, u16)> = urls
        .iter()
        .filter_map(|url| Some((url.host()?.trim_matches(['[', ']']).to_owned(), port(url))))
        .filter(|(host, _)| host.parse::<IpAddr>().is_err())
        .collect();
    if names.is_empty() {
        return;
    }
    let mut known: Vec<ApiServers> = vec![BTreeSet::new(); names.len()];
    let mut ticks = interval(AGAIN);
    loop {
        ticks.tick().await;
        for (name, known) in names.iter().zip(&mut known) {
            match timeout(PATIENCE, lookup_host((name.0.as_str(), name.1))).await {
                Ok(Ok(found)) => *known = found.map(|it| (it.ip(), it.port())).collect(),
                Ok(Err(error)) => {
                    tracing::debug!(name = name.0, %error, "cannot look up the API server's name");
                }
                Err(_) => {
                    tracing::debug!(name = name.0, "looking up the API server's name timed out")
                }
            }
        }
        let all: ApiServers = known.iter().flatten().chain(&literal).copied().collect();
        servers.send_if_modified(|servers| {
            let is_changed = *servers != all;
            *servers = all;
            is_changed
        });
    }
}

fn port(url: &Uri) -> u16 {
    let of_scheme = if url.scheme_str() == Some("http") { 80 } else { 443 };
    url.port_u16().unwrap_or(of_scheme)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn urls(texts: &[&str]) -> Vec<Uri> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn servers(texts: &[(&str, u16)]) -> ApiServers {
        texts.iter().map(|(ip, port)| (ip.parse().unwrap(), *port)).collect()
    }

    #[test]
    fn a_url_with_an_address_has_the_port_of_its_scheme() {
        let given =
            ["https://192.0.2.1:6443", "https://[2001:db8::1]", "http://192.0.2.2", "https://api"];
        let expected = [("192.0.2.1", 6443), ("2001:db8::1", 443), ("192.0.2.2", 80)];
        assert_eq!(literal(&urls(&given)), servers(&expected));
    }

    #[tokio::test]
    async fn names_are_looked_up() {
        let (sender, mut seen) = watch::channel(ApiServers::new());
        let given = urls(&["https://localhost:6443", "https://192.0.2.1:6443"]);
        let task = tokio::spawn(follow(given, sender));
        let local = servers(&[("127.0.0.1", 6443)]);
        let found = seen.wait_for(|servers| servers.is_superset(&local)).await.unwrap().clone();
        assert!(found.is_superset(&servers(&[("192.0.2.1", 6443)])));
        task.abort();
    }
}
