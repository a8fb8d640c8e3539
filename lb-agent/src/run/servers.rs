//! Starts the HTTP servers of `run`, which retry if their address is in use.

use super::agent::Agent;
use crate::{
    config::{Config, Source},
    events::{self, Notice},
    health::{
        self,
        server::{BindError, Server},
    },
    watch::api,
};

/// Starts the servers that have an address.
///
/// # Errors
/// [`BindError`] if an address cannot be bound and `--bind-address-hard-fail` is set. It
/// is published as an Event on the Node.
pub(super) async fn start(agent: &Agent) -> Result<(), BindError> {
    let result = bind_and_serve(agent).await;
    if let Err(error) = &result {
        publish_failure(&agent.config, error).await;
    }
    result
}

async fn bind_and_serve(agent: &Agent) -> Result<(), BindError> {
    let Agent { config, health, metrics, cancel, .. } = agent;
    let servers = [(Server::Health, config.healthz), (Server::Metrics, config.metrics)];
    for (server, address) in servers {
        let Some(address) = address.0 else { continue };
        let bound = if config.bind_hard_fail {
            Some(health::server::bind(server, address).await?)
        } else {
            None
        };
        let (health, metrics, cancel) = (health.clone(), metrics.clone(), cancel.clone());
        let configz = config.kube_proxy.to_configz();
        agent.tasks.spawn(async move {
            let listener = match bound {
                Some(listener) => Some(listener),
                None => health::server::bind_retrying(server, address, &cancel).await,
            };
            let Some(listener) = listener else { return };
            match server {
                Server::Health => {
                    health::server::serve_health(listener, health, metrics, cancel).await
                }
                Server::Metrics => {
                    health::server::serve_metrics(listener, metrics, configz, cancel).await
                }
            }
        });
    }
    Ok(())
}

/// Publishes an Event on the Node: a server cannot start, and the agent exits.
async fn publish_failure(config: &Config, error: &BindError) {
    let Source::Api(options) = &config.source else { return };
    let notice = match error.server() {
        Server::Health => Notice::FailedToStartProxierHealthcheck,
        Server::Metrics => Notice::FailedToStartMetricServer,
    };
    let Ok(connection) = api::connect(options).await else { return };
    let source = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
    let note = format!("{error}: {source}");
    events::publish_failure(connection.client, &config.node_name, notice, note).await;
}
