//! The sources of objects: an API server or a directory of manifests, both as the same stream
//! of [`ObjectEvent`](lb_control::model::event::ObjectEvent)s.
//!
//! Both sources apply the same selectors and drop the same unused fields
//! ([`admit`]). Neither compares a new
//! [`ObjectEvent::Replaced`](lb_control::model::event::ObjectEvent::Replaced) with the list before:
//! the receiver does, so that a repeated list changes nothing.

pub mod admit;
pub mod api;
pub mod manifests;
