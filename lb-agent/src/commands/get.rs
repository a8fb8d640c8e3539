//! `lb-agent get`: shows the pinned maps as a table or as JSON, whether an agent runs or not.
//!
//! The fields of the rows are a contract with readers of the JSON: they are not renamed, and the
//! table shows the same fields.

mod backends;
mod counters;
mod flows;
mod services;

use std::fmt;

use comfy_table::{Table, presets};
use lb_control::dataplane::DataplaneError;
use serde::{
    Deserialize, Deserializer, Serialize,
    de::{MapAccess, Visitor},
};
use serde_json::Value;

use crate::{
    cli::{GetArgs, Output, What},
    maps::{
        pins::{PinError, Pins},
        read::read_state,
        sweep, traffic,
    },
};

pub use backends::BackendRow;
pub use counters::CounterRow;
pub use flows::{AffinityRow, FlowFilter, FlowRow};
pub use services::{FrontendRow, ServiceRow};

/// The text that `lb-agent get` prints.
///
/// # Errors
/// [`GetError`], with a sentence where nothing is pinned.
pub fn get(arguments: &GetArgs) -> Result<String, GetError> {
    let pins = Pins::new(&arguments.pins.bpf_dir);
    // If nothing is pinned, this error says so, instead of naming one missing map.
    pins.open("SETTINGS")?;
    let output = arguments.output;
    if arguments.what != What::Flows && (arguments.service.is_some() || arguments.address.is_some())
    {
        return Err(GetError::Filter);
    }
    match arguments.what {
        What::Services => {
            let load =
                services::Load { flows: flows::live(&pins)?, carried: traffic::carried(&pins)? };
            render(&services::services(&read_state(&pins)?, &load), output)
        }
        What::Frontends => render(&services::frontends(&read_state(&pins)?), output),
        What::Backends => render(&backends::backends(&read_state(&pins)?), output),
        What::Flows => {
            let (service, address) = (arguments.service.clone(), arguments.address);
            render(&flows::flows(&pins, &FlowFilter { service, address })?, output)
        }
        What::Affinity => render(&flows::affinity(&pins)?, output),
        What::Counters => render(&counters::counters(&sweep::counters(&pins)?), output),
    }
}

fn render<Row: Serialize>(rows: &[Row], output: Output) -> Result<String, GetError> {
    match output {
        Output::Json => Ok(serde_json::to_string_pretty(rows)?),
        Output::Table => Ok(rows_as_table(rows)?),
    }
}

/// The rows as a table, whose columns are their fields.
pub(super) fn rows_as_table<Row: Serialize>(rows: &[Row]) -> Result<String, serde_json::Error> {
    Ok(table(&serde_json::from_str::<Vec<Fields>>(&serde_json::to_string(rows)?)?))
}

/// The fields of a row in their order, which a [`Value`] would not keep.
struct Fields(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Fields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Fields;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

/// One column a field, in the order of the fields.
fn table(rows: &[Fields]) -> String {
    let Some(Fields(first)) = rows.first() else { return "none".to_owned() };
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(first.iter().map(|(field, _)| field.to_uppercase()));
    for Fields(row) in rows {
        table.add_row(row.iter().map(|(_, value)| cell(value)));
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.trim_fmt()
}

fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(values) if values.is_empty() => "-".to_owned(),
        Value::Array(values) => values.iter().map(cell).collect::<Vec<_>>().join(","),
        Value::Object(fields) if fields.is_empty() => "-".to_owned(),
        Value::Object(fields) => {
            let fields = fields.iter().map(|(field, value)| format!("{field}={}", cell(value)));
            fields.collect::<Vec<_>>().join(",")
        }
        Value::Bool(_) | Value::Number(_) => value.to_string(),
    }
}

/// The maps could not be shown.
#[derive(Debug, thiserror::Error)]
pub enum GetError {
    /// A filter of flows was given for something else.
    #[error("--service and --address choose flows: give `get flows`, or neither of them")]
    Filter,
    /// A map is missing.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// A map could not be read.
    #[error(transparent)]
    Read(#[from] DataplaneError),
    /// A row could not be written.
    #[error("cannot write JSON")]
    Json(#[from] serde_json::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize)]
    struct Row {
        name: &'static str,
        backends: Vec<u32>,
        affinity: Option<u32>,
    }

    #[test]
    fn a_table_has_the_fields_as_columns_in_their_order() {
        let rows = [
            Row { name: "default/kubernetes", backends: vec![1, 2], affinity: None },
            Row { name: "b", backends: Vec::new(), affinity: Some(9) },
        ];
        let text = render(&rows, Output::Table).unwrap();
        let expected = "NAME                BACKENDS  AFFINITY\n\
                        default/kubernetes  1,2       -\n\
                        b                   -         9";
        assert_eq!(text, expected);
        assert_eq!(render(&rows[..0], Output::Table).unwrap(), "none");
    }

    #[test]
    fn json_is_an_array_even_of_nothing() {
        assert_eq!(render::<Row>(&[], Output::Json).unwrap(), "[]");
    }
}
