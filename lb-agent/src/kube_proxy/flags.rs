//! kube-proxy's flags, and the fields that each one sets.
//!
//! The flags are a table because all are handled alike: the value of a flag is checked as the
//! value of its field would be, and replaces it. Flags that set no field are in
//! [`crate::cli::RunArgs`].

mod table;

use std::collections::BTreeMap;

use clap::{Arg, ArgAction, ArgMatches, Command, parser::ValueSource};
use serde_json::{Map, Value};

use super::{
    decode::{self, FieldError},
    effects::{self, Effect},
    types::KubeProxyConfiguration,
};
pub use table::FLAGS;
use table::Shape;

/// Heading of the flags that lb uses.
const USED: &str = "Same as in kube-proxy";
/// Heading of the flags that lb ignores; the help of each says why.
const IGNORED: &str = "Accepted from kube-proxy, but ignored";

/// A flag of kube-proxy.
#[derive(Debug)]
pub struct Flag {
    /// The flag, without dashes.
    pub name: &'static str,
    /// The fields that it sets.
    pub fields: &'static [&'static str],
    shape: Shape,
    help: &'static str,
}

impl Flag {
    /// Whether lb uses one of its fields.
    pub fn effect(&self) -> Effect {
        let used = self.fields.iter().any(|field| effects::effect(field) == Effect::Used);
        if used { Effect::Used } else { Effect::Ignored }
    }

    /// The environment variable that sets it.
    fn variable(&self) -> String {
        match self.name {
            // The customary names.
            "kubeconfig" => "KUBECONFIG".to_owned(),
            "hostname-override" => "NODE_NAME".to_owned(),
            name => format!("LB_{}", name.to_uppercase().replace('-', "_")),
        }
    }

    fn argument(&'static self) -> Arg {
        let is_used = self.effect() == Effect::Used;
        let argument = Arg::new(self.name)
            .long(self.name)
            // kube-proxy accepts both spellings.
            .alias(self.name.replace('-', "_"))
            .env(self.variable())
            .value_name(self.shape.value_name())
            .help(self.help)
            .help_heading(if is_used { USED } else { IGNORED })
            .hide_short_help(!is_used)
            .allow_negative_numbers(true)
            .value_parser(|text: &str| self.value(text));
        match self.shape {
            Shape::Bool => {
                argument.num_args(0..=1).default_missing_value("true").overrides_with(self.name)
            }
            Shape::List | Shape::Gates | Shape::Modules => argument.action(ArgAction::Append),
            Shape::Text | Shape::Integer | Shape::Number | Shape::Duration | Shape::Port => {
                argument.overrides_with(self.name)
            }
        }
    }

    /// Parses the flag's value and checks it as the field's.
    fn value(&self, text: &str) -> Result<Value, String> {
        let value = self.shape.value(text)?;
        if self.shape != Shape::Port {
            decode::value(&self.alone(&value)).map_err(|error| error.message)?;
        }
        Ok(value)
    }

    /// A configuration in which only this flag's fields are set.
    fn alone(&self, value: &Value) -> Value {
        let mut file = Value::Object(Map::new());
        self.put(value, &mut file);
        file
    }

    fn put(&self, value: &Value, file: &mut Value) {
        for field in self.fields {
            match (self.shape, value.as_u64()) {
                (Shape::Port, Some(0)) => put(file, field, &"".into()),
                // kube-proxy adds this port only to an address without one, and its default
                // address has one.
                (Shape::Port, _) => {}
                _ => put(file, field, value),
            }
        }
    }
}

fn put(file: &mut Value, field: &str, value: &Value) {
    let mut place = file;
    for name in field.split('.') {
        place = &mut place[name];
    }
    *place = value.clone();
}

/// The flags that are set, on the command line or in the environment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KubeProxyFlags(BTreeMap<&'static str, Value>);

impl KubeProxyFlags {
    /// The configuration in which the flags replace the values of `file`.
    pub(super) fn over(
        &self,
        file: &KubeProxyConfiguration,
    ) -> Result<KubeProxyConfiguration, FieldError> {
        let mut all = file.to_json();
        for (flag, value) in self.given() {
            flag.put(value, &mut all);
        }
        decode::value(&all)
    }

    /// The flags that are set and that lb ignores.
    pub fn without_effect(&self) -> Vec<&'static str> {
        let ignored = self.given().filter(|(flag, _)| flag.effect() == Effect::Ignored);
        ignored.map(|(flag, _)| flag.name).collect()
    }

    /// Whether one of the flags sets `field`.
    pub(super) fn sets(&self, field: &str) -> bool {
        self.given().any(|(flag, _)| flag.fields.contains(&field))
    }

    fn given(&self) -> impl Iterator<Item = (&'static Flag, &Value)> {
        FLAGS.iter().filter_map(|flag| self.0.get(flag.name).map(|value| (flag, value)))
    }
}

impl clap::Args for KubeProxyFlags {
    fn augment_args(command: Command) -> Command {
        command.args(FLAGS.iter().map(Flag::argument))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl clap::FromArgMatches for KubeProxyFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut given = BTreeMap::new();
        for flag in &FLAGS {
            let source = matches.value_source(flag.name);
            if !matches!(source, Some(ValueSource::CommandLine | ValueSource::EnvVariable)) {
                continue;
            }
            let values = matches.get_many::<Value>(flag.name).into_iter().flatten();
            if let Some(value) = values.cloned().reduce(joined) {
                given.insert(flag.name, value);
            }
        }
        Ok(Self(given))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// Merges the values of a flag that is given twice: lists are appended, any other value is
/// replaced.
fn joined(first: Value, next: Value) -> Value {
    match (first, next) {
        (Value::Array(first), Value::Array(next)) => first.into_iter().chain(next).collect(),
        (Value::Object(mut first), Value::Object(next)) => {
            first.extend(next);
            Value::Object(first)
        }
        (_, next) => next,
    }
}
