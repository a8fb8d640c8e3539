//! Where objects come from: an API server or a directory of manifests, both as the
//! same stream of [`ObjectEvent`](lb_control::model::event::ObjectEvent)s.
//!
//! Both sources apply the same selectors and drop the same unused fields
//! ([`admit`]). Neither compares a new [`Event::Replaced`](lb_control::model::event::Event::Replaced) with the one before: who
//! receives it does, so that a repeated list changes nothing.

pub mod admit;
pub mod api;
pub mod manifests;
