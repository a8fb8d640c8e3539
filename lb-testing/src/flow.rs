//! A flow between a client and a backend, as the client and the backend see it.

use lb_common::{
    abi::{
        address::Address,
        flow::{FlowKey, Tuple},
    },
    balance::Endpoint,
};

use super::{interpreter::Fate, site::TestSite};

/// A flow between a client and a backend through a Service.
#[derive(Clone, Copy, Debug)]
pub struct TestFlow<A: Address> {
    /// Where its requests are received.
    pub site: TestSite,
    /// The client.
    pub client: Endpoint<A>,
    /// What the client sends to.
    pub frontend: Endpoint<A>,
    /// What the datapath did with its first frame.
    pub fate: Fate<A>,
    /// Addresses and ports as the backend sees them.
    pub sent: Tuple<A>,
}

impl<A: Address> TestFlow<A> {
    /// The backend that the datapath chose.
    pub fn backend(&self) -> Endpoint<A> {
        Endpoint { address: self.sent.destination, port: self.sent.destination_port }
    }

    /// Where replies are received, and the fate of one that is translated to `back`.
    pub fn reply_path(&self, back: Tuple<A>) -> (TestSite, Fate<A>) {
        match self.fate {
            Fate::Translated(_) if self.site == TestSite::FromDevice => {
                (TestSite::ToDeviceForwarded, Fate::Translated(back))
            }
            Fate::Translated(_) if self.site == TestSite::Loopback => {
                (TestSite::Loopback, Fate::Translated(back))
            }
            Fate::Translated(_) => (TestSite::ToPod, Fate::Translated(back)),
            Fate::Hairpinned(_) => (TestSite::FromPod, Fate::Hairpinned(back)),
            Fate::Routed(_) if self.site == TestSite::Loopback => {
                (TestSite::FromDevice, Fate::IntoLoopback(back))
            }
            Fate::Routed(_) => (TestSite::FromDevice, Fate::Translated(back)),
            Fate::Forwarded(_) => (TestSite::FromDevice, Fate::Forwarded(back)),
            Fate::IntoLoopback(_)
                if matches!(self.site, TestSite::FromDevice | TestSite::FromPod) =>
            {
                (TestSite::Loopback, Fate::Forwarded(back))
            }
            Fate::IntoLoopback(_) => (TestSite::Loopback, Fate::Translated(back)),
            other => panic!("no request ends as {other:?}"),
        }
    }

    /// The fate of a request that is translated to `translated`.
    pub fn request_fate(&self, translated: Tuple<A>) -> Fate<A> {
        match self.fate {
            Fate::Translated(_) => Fate::Translated(translated),
            Fate::Hairpinned(_) => Fate::Hairpinned(translated),
            Fate::Routed(_) => Fate::Routed(translated),
            Fate::Forwarded(_) => Fate::Forwarded(translated),
            Fate::IntoLoopback(_) => Fate::IntoLoopback(translated),
            Fate::IntoDevice(_, device) => Fate::IntoDevice(translated, device),
            other => panic!("no request ends as {other:?}"),
        }
    }

    /// The key of the entry for requests.
    pub fn key(&self, protocol: u8) -> FlowKey<A> {
        FlowKey { tuple: tuple(self.client, self.frontend), protocol: protocol.into() }
    }

    /// The key of the entry for replies.
    pub fn reply_key(&self, protocol: u8) -> FlowKey<A> {
        FlowKey { tuple: self.sent.reversed(), protocol: protocol.into() }
    }
}

/// Addresses and ports of a packet from `source` to `destination`.
pub fn tuple<A: Address>(source: Endpoint<A>, destination: Endpoint<A>) -> Tuple<A> {
    Tuple {
        source: source.address,
        destination: destination.address,
        source_port: source.port,
        destination_port: destination.port,
    }
}
