//! Gives nodes of one cluster the API server of another one.
//!
//! All clusters have the same addresses and hold the same objects, so one control plane serves them
//! all. Each expects it at the same address of its own fabric, where a relay listens.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;

use anyhow::{Context, Result};

use crate::harness::netns::topology::fabric::Fabric;

/// Relays connections to `address` in the fabric `from` to the same address in the fabric `to`.
/// The relay's threads end with the process.
///
/// # Errors
/// The address is taken.
pub fn start(from: &Fabric, to: &Fabric, address: SocketAddr) -> Result<()> {
    let listener = from.netns().run(|| {
        TcpListener::bind(address).with_context(|| format!("cannot listen at {address}"))
    })?;
    let server = crate::harness::netns::topology::namespace::Netns::open(to.netns().name())?;
    thread::spawn(move || {
        for near in listener.incoming().flatten() {
            // Without an API server the client's connection is closed.
            let Ok(far) = server.run(|| Ok(TcpStream::connect(address)?)) else { continue };
            splice(near, far).ok();
        }
    });
    Ok(())
}

fn splice(near: TcpStream, far: TcpStream) -> io::Result<()> {
    for (mut from, mut to) in
        [(near.try_clone()?, far.try_clone()?), (far.try_clone()?, near.try_clone()?)]
    {
        thread::spawn(move || {
            io::copy(&mut from, &mut to).ok();
            to.shutdown(Shutdown::Write).ok();
        });
    }
    Ok(())
}
