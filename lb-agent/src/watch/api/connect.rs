//! The connection to the API servers that the watch and the Events share.

use std::sync::Arc;

use axum::http::Uri;
use kube::Client;
use tower::util::service_fn;

use super::{
    access::{Access, ConnectError, Options},
    learned::Learned,
    liveness::Liveness,
    servers::{Requests, Servers},
};

/// A client of whichever server serves.
#[derive(Clone)]
pub struct Connection {
    /// The client. Every request goes to the server that serves now.
    pub client: Client,
    servers: Option<Arc<Servers>>,
    liveness: Liveness,
    learned: Learned,
}

impl Connection {
    /// The connection of a ready client, to one server.
    pub fn new(client: Client) -> Self {
        let requests = Requests::new(service_fn(move |request| {
            let client = client.clone();
            async move { Ok(client.send(request).await?) }
        }));
        Self::over(requests, None, Learned::default())
    }

    fn over(requests: Requests, servers: Option<Arc<Servers>>, learned: Learned) -> Self {
        let (client, liveness) = (Client::new(requests, "default"), Liveness::default());
        Self { client, servers, liveness, learned }
    }

    /// The server that serves, or the configured ones if none does.
    pub fn server(&self) -> String {
        self.servers.as_ref().map(|servers| servers.described()).unwrap_or_default()
    }

    /// The servers that are configured.
    pub fn configured(&self) -> Vec<Uri> {
        self.servers.as_ref().map(|servers| servers.given()).unwrap_or_default()
    }

    /// The state of the watches.
    pub fn liveness(&self) -> &Liveness {
        &self.liveness
    }

    /// What is known of the API servers.
    pub fn learned(&self) -> &Learned {
        &self.learned
    }

    /// What to try when no server is reachable.
    pub fn advice(&self) -> Option<&'static str> {
        self.servers.as_ref().and_then(|servers| servers.advice())
    }
}

/// Makes a client, without contacting a server.
///
/// # Errors
/// If the configuration is missing or wrong, with the remedy.
pub async fn connect(options: &Options) -> Result<Connection, ConnectError> {
    let access = Access::read(options).await?;
    let learned = Learned::open(options.state_dir.as_deref());
    let servers = Arc::new(Servers::new(options.clone(), access, learned.clone())?);
    Ok(Connection::over(Servers::service(&servers), Some(servers), learned))
}
