//! How much memory the state of a large cluster takes: what is kept, not what is used on the way.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering},
};

use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use lb_control::{
    controller::Controller,
    dataplane::{Capacity, fake::Fake},
    model::event::{Object, ObjectEvent, ObjectKind},
    options::ExternalMode,
};
use serde_json::{Value, json};

const SERVICES: u32 = 10_000;
const ENDPOINTS: u32 = 10;

const CAPACITY: Capacity = Capacity {
    services: 32_768,
    slots: 1 << 18,
    backends4: 1 << 17,
    backends6: 2,
    frontends4: 32_768,
    frontends6: 2,
    ranges4: 2,
    ranges6: 2,
    nodes4: 2,
    nodes6: 2,
};

/// Counts the bytes that are allocated now.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);

/// What an allocator needs for `size` bytes: a multiple of 16, and 8 bytes beside it.
fn taken(size: usize) -> usize {
    (size + 8).next_multiple_of(16).max(32)
}

// SAFETY: all calls go to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(taken(layout.size()), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(taken(layout.size()), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn live() -> usize {
    LIVE.load(Ordering::Relaxed)
}

fn service(number: u32) -> Object {
    let object = json!({
        "metadata": {
            "namespace": format!("team-{:02}", number % 100), "name": format!("web-{number:05}"),
            "uid": format!("0b0e2c4a-5d59-4d67-8a64-{number:012}"),
            "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {
            "clusterIP": std::net::Ipv4Addr::from(0x0a60_0001 + number),
            "ports": [{ "name": "http", "port": 80 }],
        },
    });
    serde_json::from_value::<Service>(object).expect("a Service").into()
}

fn slice(number: u32) -> Object {
    let endpoint = |at: u32| -> Value {
        let ip = std::net::Ipv4Addr::from(0x0a80_0001 + number * ENDPOINTS + at);
        json!({
            "addresses": [ip], "conditions": { "ready": true },
            "nodeName": format!("worker-{:04}", (number * ENDPOINTS + at) % 100),
        })
    };
    let object = json!({
        "metadata": {
            "namespace": format!("team-{:02}", number % 100), "name": format!("web-{number:05}-x7k2p"),
            "labels": { "kubernetes.io/service-name": format!("web-{number:05}") },
        },
        "addressType": "IPv4",
        "endpoints": (0..ENDPOINTS).map(endpoint).collect::<Vec<_>>(),
        "ports": [{ "name": "http", "port": 8080 }],
    });
    serde_json::from_value::<EndpointSlice>(object).expect("a slice").into()
}

#[test]
fn ten_thousand_services_with_ten_endpoints_take_few_megabytes() {
    let mut controller = Controller::new("here", ExternalMode::Snat, []);
    let mut fake = Fake::new(CAPACITY);
    let before = live();
    let services = (0..SERVICES).map(service).collect();
    controller.apply(ObjectEvent::Replaced(ObjectKind::Service, services));
    let of_services = live() - before;
    let slices = (0..SERVICES).map(slice).collect();
    controller.apply(ObjectEvent::Replaced(ObjectKind::EndpointSlice, slices));
    let of_snapshot = live() - before;
    let outcome = controller.reconcile(0, &mut fake).expect("a fake can be read");
    assert!(outcome.errors.is_empty() && outcome.shortages.is_empty());
    drop(outcome);
    // The entries of the fake's frontends are not the agent's.
    fake.frontends4.clear();
    let all = live() - before;
    println!("Services {of_services}, with slices {of_snapshot}, with the plan {all} bytes");
    assert!(all < 34 << 20, "{all} bytes");
}
