//! Reads the network namespace once, without following it.

use std::collections::BTreeSet;

use futures::TryStreamExt;
use netlink_packet_route::link::{LinkAttribute, LinkMessage, LinkXdp};
use rtnetlink::Handle;

use super::{error::InterfaceError, interfaces::Network, messages::read, rules};

/// What was found.
#[derive(Clone, Debug, Default)]
pub struct NetworkSurvey {
    /// The network namespace.
    pub network: Network,
    /// The interfaces that have an XDP program of any owner, by index.
    pub with_xdp: BTreeSet<u32>,
    /// The marks of rules that packets of Services may need and do not get.
    pub needed_marks: BTreeSet<u32>,
}

/// Reads the network namespace.
///
/// # Errors
/// [`InterfaceError`] if netlink cannot be read.
pub async fn survey() -> Result<NetworkSurvey, InterfaceError> {
    let (connection, handle, _) =
        rtnetlink::new_connection().map_err(|source| InterfaceError::Connect { source })?;
    let connection = tokio::spawn(connection);
    let found = look(&handle).await;
    connection.abort();
    found
}

async fn look(handle: &Handle) -> Result<NetworkSurvey, InterfaceError> {
    let links: Vec<LinkMessage> = handle
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(|source| InterfaceError::Read { source })?;
    let with_xdp = links.iter().filter(|link| has_xdp(link)).map(|link| link.header.index);
    Ok(NetworkSurvey {
        network: read(handle).await?,
        with_xdp: with_xdp.collect(),
        needed_marks: rules::needed_marks(handle).await?,
    })
}

fn has_xdp(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::Xdp(parts) => parts.iter().any(|part| {
            matches!(part, LinkXdp::ProgId(_) | LinkXdp::DrvProgId(_) | LinkXdp::SkbProgId(_))
        }),
        _ => false,
    })
}
