//! Parses text into fields as Go does: `null` leaves a field unset, and strings and numbers are
//! not converted into each other.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{
        self, Expected, IntoDeserializer, Unexpected, Visitor,
        value::{MapDeserializer, SeqDeserializer},
    },
    forward_to_deserialize_any,
};
use serde_json::Value;

use super::{API_VERSION, KIND, types::KubeProxyConfiguration};

/// An invalid field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldError {
    /// The path, such as `conntrack.maxPerCore`; empty if the text as a whole is invalid.
    pub path: String,
    /// The error.
    pub message: String,
    /// There is no such field.
    pub is_unknown: bool,
}

impl FieldError {
    pub(super) fn new(path: &str, message: impl Into<String>) -> Self {
        Self { path: path.to_owned(), message: message.into(), is_unknown: false }
    }
}

impl fmt::Display for FieldError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.path.as_str() {
            "" => formatter.write_str(&self.message),
            path => write!(formatter, "{path}: {}", self.message),
        }
    }
}

impl std::error::Error for FieldError {}

/// Parses the text of a file. JSON is a subset of YAML.
pub(super) fn text(text: &str) -> Result<KubeProxyConfiguration, FieldError> {
    let options = serde_saphyr::options! { with_snippet: false };
    let value: Value = serde_saphyr::from_str_with_options(text, options).map_err(|error| {
        let message = error.to_string();
        FieldError::new("", message.lines().next().unwrap_or_default())
    })?;
    type_of(&value, "apiVersion", API_VERSION)?;
    type_of(&value, "kind", KIND)?;
    without_unknown(value)
}

/// Parses a tree of values. A field that kube-proxy does not have, or has no more, is left out
/// and named: files of clusters that were upgraded through the years hold such fields.
fn without_unknown(mut value: Value) -> Result<KubeProxyConfiguration, FieldError> {
    let mut unknown = Vec::new();
    loop {
        match self::value(&value) {
            Ok(mut all) => {
                all.unknown = unknown;
                return Ok(all);
            }
            Err(fault) if fault.is_unknown && remove(&mut value, &fault.path) => {
                unknown.push(fault.path);
            }
            Err(fault) => return Err(fault),
        }
    }
}

/// Removes the field at a path such as `logging.vmodule[1].name`; false if there is none.
fn remove(value: &mut Value, path: &str) -> bool {
    let (parents, field) = path.rsplit_once('.').unwrap_or(("", path));
    let pointer: String = parents
        .split(['.', '[', ']'])
        .filter(|part| !part.is_empty())
        .map(|part| format!("/{part}"))
        .collect();
    let parent = value.pointer_mut(&pointer).and_then(Value::as_object_mut);
    parent.is_some_and(|parent| parent.remove(field).is_some())
}

fn type_of(value: &Value, field: &str, expected: &str) -> Result<(), FieldError> {
    match value.get(field) {
        Some(Value::String(found)) if found == expected => Ok(()),
        None | Some(Value::Null) => {
            Err(FieldError::new(field, format!("missing: it must be {expected}")))
        }
        Some(found) => Err(FieldError::new(field, format!("expected {expected}, found {found}"))),
    }
}

/// Parses a tree of values.
pub(super) fn value(value: &Value) -> Result<KubeProxyConfiguration, FieldError> {
    let mut track = serde_path_to_error::Track::new();
    let deserializer = serde_path_to_error::Deserializer::new(Tree(value), &mut track);
    KubeProxyConfiguration::deserialize(deserializer).map_err(|fault| {
        let path = track.path().to_string();
        let path = path.trim_matches(['?', '.']);
        match fault {
            Fault::Wrong(message) => FieldError::new(path, message),
            Fault::Unknown(field) => {
                let parent = path.strip_suffix(&field).unwrap_or(path).trim_end_matches('.');
                let separator = if parent.is_empty() { "" } else { "." };
                let path = format!("{parent}{separator}{field}");
                FieldError { is_unknown: true, ..FieldError::new(&path, "unknown field") }
            }
        }
    })
}

/// Why a value does not fit the type of its field.
#[derive(Debug)]
enum Fault {
    Wrong(String),
    Unknown(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Wrong(message) => formatter.write_str(message),
            Self::Unknown(field) => write!(formatter, "unknown field {field:?}"),
        }
    }
}

impl std::error::Error for Fault {}

impl de::Error for Fault {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::Wrong(message.to_string())
    }

    fn invalid_type(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        let expected = match expected.to_string().as_str() {
            "i32" | "u32" => "an integer".to_owned(),
            "f32" => "a number".to_owned(),
            "a sequence" => "a list".to_owned(),
            text if text.starts_with("struct ") => "a map".to_owned(),
            text => text.to_owned(),
        };
        Self::Wrong(format!("expected {expected}, found {}", shown(found)))
    }

    fn invalid_value(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        let expected = match expected.to_string().as_str() {
            "i32" => "an integer of 32 bits".to_owned(),
            "u32" => "a non-negative integer of 32 bits".to_owned(),
            text => text.to_owned(),
        };
        Self::Wrong(format!("expected {expected}, found {}", shown(found)))
    }

    fn unknown_field(field: &str, _known: &'static [&'static str]) -> Self {
        Self::Unknown(field.to_owned())
    }
}

fn shown(found: Unexpected<'_>) -> String {
    match found {
        Unexpected::Str(text) => format!("{text:?}"),
        Unexpected::Bool(value) => value.to_string(),
        Unexpected::Unsigned(number) => number.to_string(),
        Unexpected::Signed(number) => number.to_string(),
        Unexpected::Float(number) => number.to_string(),
        Unexpected::Seq => "a list".to_owned(),
        Unexpected::Map => "a map".to_owned(),
        Unexpected::Unit | Unexpected::Option => "null".to_owned(),
        other => other.to_string(),
    }
}

/// A tree of values that skips nulls.
#[derive(Clone, Copy)]
struct Tree<'a>(&'a Value);

impl<'a> IntoDeserializer<'a, Fault> for Tree<'a> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

impl<'de> Deserializer<'de> for Tree<'de> {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self.0 {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Number(number) => match (number.as_u64(), number.as_i64(), number.as_f64()) {
                (Some(number), _, _) => visitor.visit_u64(number),
                (None, Some(number), _) => visitor.visit_i64(number),
                (None, None, number) => visitor.visit_f64(number.unwrap_or(f64::NAN)),
            },
            Value::String(text) => visitor.visit_borrowed_str(text),
            Value::Array(items) => visitor.visit_seq(SeqDeserializer::new(items.iter().map(Tree))),
            Value::Object(fields) => {
                let set = fields.iter().filter(|(_, value)| !value.is_null());
                let set = set.map(|(name, value)| (name.as_str(), Tree(value)));
                visitor.visit_map(MapDeserializer::new(set))
            }
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match self.0 {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        visitor.visit_newtype_struct(self)
    }

    /// Rejects a list, which serde would accept as a struct's fields in order.
    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        _fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        match self.0 {
            Value::Array(_) => Err(de::Error::invalid_type(Unexpected::Seq, &visitor)),
            _ => self.deserialize_any(visitor),
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf
        unit unit_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}
