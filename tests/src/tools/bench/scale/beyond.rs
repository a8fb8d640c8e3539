//! An agent with as much as a large cluster has: a quarter of a million endpoints, and a hundred
//! thousand Services.

use std::time::Duration;

use anyhow::{Context, Result};

use super::objects::Size;
use super::report::Figure;
use super::{Lab, Plan, Targets};

/// Both sizes, what a start with them is judged by, and the capacities that they need.
const CASES: [(Size, Targets, [&str; 6]); 2] = [
    (
        Size { services: 10_000, endpoints: 25 },
        Targets { start: (1.5, 3.0), memory: Some((90.0, 150.0)) },
        ["--max-services", "65536", "--max-backends", "524288", "--max-slots", "1048576"],
    ),
    (
        Size { services: 100_000, endpoints: 1 },
        Targets { start: (2.0, 5.0), memory: None },
        ["--max-services", "262144", "--max-backends", "262144", "--max-slots", "1048576"],
    ),
];

/// Starts an agent with each size.
///
/// # Errors
/// The node cannot be built, or the agent does not serve.
pub fn measure() -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for (size, targets, arguments) in CASES {
        let Size { services, endpoints } = size;
        let name = format!("{services} x {endpoints}");
        let plan = Plan { size, changes: 0, time: Duration::ZERO };
        let mut found = Vec::new();
        let mut lab = Lab::new(plan)?;
        lab.start(&arguments, targets, &mut found).with_context(|| name.clone())?;
        figures.extend(found.into_iter().map(|figure| figure.of(&name)));
    }
    Ok(figures)
}
