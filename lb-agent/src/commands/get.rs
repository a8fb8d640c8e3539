//! `lb-agent get`: shows the pinned maps as a table or as JSON, whether an agent runs or not.
//!
//! The fields of the rows are a contract with readers of the JSON: they are not renamed, and the
//! table shows the same fields.

mod affinity;
mod backends;
mod clock;
mod counters;
mod flows;
mod services;
mod table;
mod text;

use std::io::{self, Write};

use lb_control::dataplane::DataplaneError;
use serde::{Serialize, Serializer as _};

use crate::{
    cli::{GetArgs, Output, What},
    maps::{
        pins::{PinError, Pins},
        read::read_state,
        sweep, traffic,
    },
};

pub use affinity::AffinityRow;
pub use backends::BackendRow;
pub use counters::CounterRow;
pub use flows::{FlowFilter, FlowRow, States};
pub use services::{FrontendRow, ServiceRow};
pub use text::AddressText;

/// Writes what `lb-agent get` prints.
///
/// # Errors
/// [`GetError`], with a sentence where nothing is pinned.
pub fn get(arguments: &GetArgs, out: &mut impl Write) -> Result<(), GetError> {
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
            let rows = services::services(&read_state(&pins)?, &load);
            render(out, || rows.iter(), output)
        }
        What::Frontends => {
            let rows = services::frontends(&read_state(&pins)?);
            render(out, || rows.iter(), output)
        }
        What::Backends => {
            let rows = backends::backends(&read_state(&pins)?);
            render(out, || rows.iter(), output)
        }
        What::Flows => {
            let (service, address) = (arguments.service.clone(), arguments.address);
            let shown = flows::Shown::read(&pins, &FlowFilter { service, address })?;
            render(out, || shown.rows(), output)
        }
        What::Affinity => {
            let rows = affinity::affinity(&pins)?;
            render(out, || rows.iter(), output)
        }
        What::Counters => {
            let rows = counters::counters(&sweep::counters(&pins)?);
            render(out, || rows.iter(), output)
        }
    }
}

/// Writes each row as soon as it is there.
fn render<Row: Serialize, Rows: Iterator<Item = Row>>(
    out: &mut impl Write,
    rows: impl Fn() -> Rows,
    output: Output,
) -> Result<(), GetError> {
    match output {
        Output::Json => {
            serde_json::Serializer::pretty(&mut *out).collect_seq(rows())?;
            Ok(writeln!(out)?)
        }
        Output::Table => table::write(out, rows),
    }
}

/// The rows as a table, whose columns are their fields.
pub(super) fn rows_as_table<Row: Serialize>(rows: &[Row]) -> Result<String, GetError> {
    let mut text = Vec::new();
    table::write(&mut text, || rows.iter())?;
    Ok(String::from_utf8_lossy(&text).trim_end().to_owned())
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
    /// A row could not be written.
    #[error("cannot write")]
    Write(#[from] io::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize)]
    struct Row {
        backends: Vec<u32>,
    }

    #[test]
    fn json_is_an_array_even_of_nothing() {
        let text = |rows: &[Row]| {
            let mut text = Vec::new();
            render(&mut text, || rows.iter(), Output::Json).unwrap();
            String::from_utf8(text).unwrap()
        };
        assert_eq!(text(&[]), "[]\n");
        let rows = [Row { backends: vec![1] }, Row { backends: Vec::new() }];
        let parsed: serde_json::Value = serde_json::from_str(&text(&rows)).unwrap();
        assert_eq!(parsed, serde_json::json!([{"backends": [1]}, {"backends": []}]));
    }
}
