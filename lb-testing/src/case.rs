//! A behaviour case, and how it is run.

use std::{
    any::Any,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
};

use lb_common::abi::frontend::UDP;

use super::{
    family::TestFamily,
    interpreter::{Interpreter, Untestable},
    scene::Scene,
    world::World,
};

/// A behaviour case with a protocol: a sentence that holds, and the function that shows it.
pub struct Case<F: TestFamily> {
    /// The path of the module that the case is in.
    pub module: &'static str,
    /// The sentence.
    pub name: &'static str,
    /// TCP or UDP.
    pub protocol: u8,
    /// Panics if the sentence does not hold.
    pub show: fn(&mut Scene<F>),
}

/// `FILE::CASE::FAMILY::PROTOCOL`, e.g. `udp::a_flow_of_a_deleted_service_stays::ipv6::udp`.
impl<F: TestFamily> fmt::Display for Case<F> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = self.module.rsplit("::").next().unwrap_or(self.module);
        let protocol = if self.protocol == UDP { "udp" } else { "tcp" };
        write!(formatter, "{file}::{}::ipv{}::{protocol}", self.name, F::NUMBER)
    }
}

/// Why a case did not pass.
#[derive(Debug)]
pub enum Failure {
    /// Its message, after the panic hook has printed it and where it came from.
    Panic(String),
    /// The interpreter cannot make one of its frames here.
    Untestable,
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Panic(message) => formatter.write_str(message),
            Self::Untestable => formatter.write_str("this kernel cannot run one of its frames"),
        }
    }
}

impl<F: TestFamily> Case<F> {
    /// Runs the case.
    ///
    /// # Errors
    /// It does not hold, or cannot be tried here.
    pub fn run(&self, interpreter: &mut dyn Interpreter<F>) -> Result<(), Failure> {
        let show = AssertUnwindSafe(|| {
            interpreter.reset();
            let world = World::default();
            (self.show)(&mut Scene { interpreter, world, protocol: self.protocol });
            interpreter.finish();
        });
        catch_unwind(show).map_err(|panic| match panic.is::<Untestable>() {
            true => Failure::Untestable,
            false => Failure::Panic(message(&*panic)),
        })
    }
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
}
