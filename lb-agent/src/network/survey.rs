//! Reads the network namespace once, without following it.

use std::collections::BTreeSet;

use futures::TryStreamExt;
use netlink_packet_route::link::{LinkAttribute, LinkMessage, LinkXdp};
use rtnetlink::Handle;

use super::{error::InterfaceError, interfaces::Network, messages::read};

/// The network namespace, and the interfaces that have an XDP program of any owner.
///
/// # Errors
/// [`InterfaceError`] if netlink cannot be read.
pub async fn survey() -> Result<(Network, BTreeSet<u32>), InterfaceError> {
    let (connection, handle, _) =
        rtnetlink::new_connection().map_err(|source| InterfaceError::Connect { source })?;
    let connection = tokio::spawn(connection);
    let found = look(&handle).await;
    connection.abort();
    found
}

async fn look(handle: &Handle) -> Result<(Network, BTreeSet<u32>), InterfaceError> {
    let links: Vec<LinkMessage> = handle
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(|source| InterfaceError::Read { source })?;
    let occupied = links.iter().filter(|link| has_xdp(link)).map(|link| link.header.index);
    Ok((read(handle).await?, occupied.collect()))
}

fn has_xdp(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::Xdp(parts) => parts.iter().any(|part| {
            matches!(part, LinkXdp::ProgId(_) | LinkXdp::DrvProgId(_) | LinkXdp::SkbProgId(_))
        }),
        _ => false,
    })
}
