//! The network namespace as the kernel tells it, a message in a line, for `lb-agent sysdump`.

use std::fmt::{Debug, Write};

use futures::{Stream, TryStreamExt};
use netlink_packet_route::route::RouteMessage;
use rtnetlink::{Error, Handle, IpVersion, RouteMessageBuilder};

use super::error::InterfaceError;

/// Links, addresses, routes, rules and neighbours: names of files, and their lines.
///
/// # Errors
/// [`InterfaceError`] if there is no netlink. What one question fails with is in its text.
pub async fn dump() -> Result<Vec<(&'static str, String)>, InterfaceError> {
    let (connection, handle, _) =
        rtnetlink::new_connection().map_err(|source| InterfaceError::Connect { source })?;
    let connection = tokio::spawn(connection);
    let found = vec![
        ("links", lines(handle.link().get().execute()).await),
        ("addresses", lines(handle.address().get().execute()).await),
        ("routes", routes(&handle).await),
        (
            "rules",
            lines(handle.rule().get(IpVersion::V4).execute()).await
                + &lines(handle.rule().get(IpVersion::V6).execute()).await,
        ),
        ("neighbours", lines(handle.neighbours().get().execute()).await),
    ];
    connection.abort();
    Ok(found)
}

async fn routes(handle: &Handle) -> String {
    let of = |message: RouteMessage| lines(handle.route().get(message).execute());
    let v4 = RouteMessageBuilder::<std::net::Ipv4Addr>::new().build();
    let v6 = RouteMessageBuilder::<std::net::Ipv6Addr>::new().build();
    of(v4).await + &of(v6).await
}

async fn lines<T: Debug>(messages: impl Stream<Item = Result<T, Error>>) -> String {
    let messages: Result<Vec<T>, Error> = messages.try_collect().await;
    let mut text = String::new();
    let written = match messages {
        Ok(messages) => messages.iter().try_for_each(|message| writeln!(text, "{message:?}")),
        Err(error) => writeln!(text, "error: {error}"),
    };
    // A String takes everything.
    debug_assert!(written.is_ok());
    text
}
