//! The source port, one of this node's, of a new flow that cannot keep its client's.

use crate::abi::address::{Be16, Family};

use super::{
    tables::Tables,
    types::{Context, Work},
};

/// The number of source ports that are tried. If seven in ten are taken, all of them are taken for
/// one in three million flows.
const ATTEMPTS: u32 = 42;

/// Gives the new flow a random source port of this node. Returns false if the node has none.
#[inline(always)]
pub(super) fn draw_port<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> bool {
    let ports = context.settings.source_ports;
    if ports.count == 0 {
        return false;
    }
    let offset = (tables.random() as u64 * ports.count as u64) >> 32;
    let port = Be16::new(ports.first.wrapping_add(offset as u16));
    work.scratch.new.flow.rewrite.source_port = port;
    work.scratch.new.reply_key.tuple.destination_port = port;
    true
}

/// Gives the new flow a free source port of this node. Returns whether one was found.
#[inline(never)]
pub(super) fn find_port<F: Family, T: Tables<F>>(
    context: &Context<F>,
    work: &mut Work<F::Address>,
    tables: &mut T,
) -> bool {
    let mut attempt = 0;
    while attempt < ATTEMPTS && draw_port(context, work, tables) {
        if !tables.may_have_reply(&work.scratch.new.reply_key) {
            return true;
        }
        attempt += 1;
    }
    false
}
