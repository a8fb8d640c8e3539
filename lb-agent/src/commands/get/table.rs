//! Rows as a table, whose columns are their fields.
//!
//! A row is serialised into its cells, so that the table and the JSON show the same fields. Rows are gone
//! through twice, for the widths of the columns and then to be written, and none is kept: there may be a
//! million. A row that has changed in between is not aligned.

use std::{
    fmt::{self, Write as _},
    io,
};

use serde::{
    Serialize, Serializer,
    ser::{Error as _, Impossible, SerializeMap, SerializeSeq, SerializeStruct},
};
use serde_json::Error;

use super::GetError;

/// Between two columns.
const GAP: usize = 2;

/// Writes the rows that `rows` goes through, and `none` if there is none.
pub(super) fn write<Row: Serialize, Rows: Iterator<Item = Row>>(
    out: &mut impl io::Write,
    rows: impl Fn() -> Rows,
) -> Result<(), GetError> {
    let mut cells = Cells::default();
    let mut widths = Vec::new();
    for row in rows() {
        cells.fill(&row)?;
        if widths.is_empty() {
            widths = cells.names.iter().map(|name| name.len()).collect();
        }
        for (width, cell) in widths.iter_mut().zip(cells.texts()) {
            *width = cell.chars().count().max(*width);
        }
    }
    if widths.is_empty() {
        return Ok(writeln!(out, "none")?);
    }
    let mut line = String::new();
    let titles: Vec<_> = cells.names.iter().map(|name| name.to_uppercase()).collect();
    pad(&mut line, titles.iter().map(String::as_str), &widths);
    out.write_all(line.as_bytes())?;
    for row in rows() {
        cells.fill(&row)?;
        pad(&mut line, cells.texts(), &widths);
        out.write_all(line.as_bytes())?;
    }
    Ok(())
}

/// Makes a line of some cells.
fn pad<'a>(line: &mut String, cells: impl Iterator<Item = &'a str>, widths: &[usize]) {
    line.clear();
    for (cell, width) in cells.zip(widths) {
        line.push_str(cell);
        let spaces = width.saturating_sub(cell.chars().count()) + GAP;
        line.extend(std::iter::repeat_n(' ', spaces));
    }
    line.truncate(line.trim_end().len());
    line.push('\n');
}

/// The cells of a row.
#[derive(Default)]
struct Cells {
    text: String,
    /// Where each cell ends in `text`.
    ends: Vec<usize>,
    /// The fields of the rows.
    names: Vec<&'static str>,
    /// A value inside of a cell is serialised, and not the row.
    is_inside: bool,
}

impl Cells {
    fn fill(&mut self, row: &impl Serialize) -> Result<(), Error> {
        self.text.clear();
        self.ends.clear();
        self.is_inside = false;
        row.serialize(self)
    }

    fn texts(&self) -> impl Iterator<Item = &str> {
        let starts = [0].into_iter().chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, end)| self.text.get(start..*end).unwrap_or_default())
    }

    fn put(&mut self, value: impl fmt::Display) -> Result<(), Error> {
        write!(self.text, "{value}").map_err(Error::custom)
    }
}

/// The parts of a row, or of a value that has several.
struct Parts<'a> {
    cells: &'a mut Cells,
    is_row: bool,
    is_empty: bool,
}

impl Parts<'_> {
    /// Puts a comma before all parts but the first.
    fn begin(&mut self) {
        if !std::mem::take(&mut self.is_empty) {
            self.cells.text.push(',');
        }
    }

    fn finish(self) {
        if self.is_empty {
            self.cells.text.push('-');
        }
    }
}

impl SerializeStruct for Parts<'_> {
    type Ok = ();
    type Error = Error;

    fn serialize_field<T: ?Sized + Serialize>(
        &mut self,
        name: &'static str,
        value: &T,
    ) -> Result<(), Error> {
        if !self.is_row {
            self.begin();
            self.cells.put(format_args!("{name}="))?;
            return value.serialize(&mut *self.cells);
        }
        self.cells.is_inside = true;
        value.serialize(&mut *self.cells)?;
        self.cells.is_inside = false;
        if self.cells.names.len() == self.cells.ends.len() {
            self.cells.names.push(name);
        }
        self.cells.ends.push(self.cells.text.len());
        Ok(())
    }

    fn end(self) -> Result<(), Error> {
        if !self.is_row {
            self.finish();
        }
        Ok(())
    }
}

impl SerializeSeq for Parts<'_> {
    type Ok = ();
    type Error = Error;

    fn serialize_element<T: ?Sized + Serialize>(&mut self, value: &T) -> Result<(), Error> {
        self.begin();
        value.serialize(&mut *self.cells)
    }

    fn end(self) -> Result<(), Error> {
        self.finish();
        Ok(())
    }
}

impl SerializeMap for Parts<'_> {
    type Ok = ();
    type Error = Error;

    fn serialize_key<T: ?Sized + Serialize>(&mut self, key: &T) -> Result<(), Error> {
        self.begin();
        key.serialize(&mut *self.cells)
    }

    fn serialize_value<T: ?Sized + Serialize>(&mut self, value: &T) -> Result<(), Error> {
        self.cells.text.push('=');
        value.serialize(&mut *self.cells)
    }

    fn end(self) -> Result<(), Error> {
        self.finish();
        Ok(())
    }
}

/// A value of a kind that no row has.
fn no_cell<T>(kind: &str) -> Result<T, Error> {
    Err(Error::custom(format_args!("{kind} is no cell of a table")))
}

/// Methods of [`Serializer`] for values that are shown as they are displayed.
macro_rules! displayed {
    ($($method:ident: $type:ty),*) => {
        $(fn $method(self, value: $type) -> Result<(), Error> {
            self.put(value)
        })*
    };
}

impl<'a> Serializer for &'a mut Cells {
    type Ok = ();
    type Error = Error;
    type SerializeSeq = Parts<'a>;
    type SerializeTuple = Impossible<(), Error>;
    type SerializeTupleStruct = Impossible<(), Error>;
    type SerializeTupleVariant = Impossible<(), Error>;
    type SerializeMap = Parts<'a>;
    type SerializeStruct = Parts<'a>;
    type SerializeStructVariant = Impossible<(), Error>;

    displayed!(
        serialize_bool: bool,
        serialize_i8: i8,
        serialize_i16: i16,
        serialize_i32: i32,
        serialize_i64: i64,
        serialize_u8: u8,
        serialize_u16: u16,
        serialize_u32: u32,
        serialize_u64: u64,
        serialize_f32: f32,
        serialize_f64: f64,
        serialize_char: char
    );

    fn serialize_str(self, value: &str) -> Result<(), Error> {
        self.text.push_str(value);
        Ok(())
    }

    fn serialize_none(self) -> Result<(), Error> {
        self.serialize_str("-")
    }

    fn serialize_unit(self) -> Result<(), Error> {
        self.serialize_none()
    }

    fn serialize_some<T: ?Sized + Serialize>(self, value: &T) -> Result<(), Error> {
        value.serialize(self)
    }

    fn serialize_newtype_struct<T: ?Sized + Serialize>(
        self,
        _name: &'static str,
        value: &T,
    ) -> Result<(), Error> {
        value.serialize(self)
    }

    fn serialize_unit_variant(
        self,
        _name: &'static str,
        _index: u32,
        variant: &'static str,
    ) -> Result<(), Error> {
        self.serialize_str(variant)
    }

    fn serialize_seq(self, _length: Option<usize>) -> Result<Parts<'a>, Error> {
        Ok(Parts { cells: self, is_row: false, is_empty: true })
    }

    fn serialize_map(self, _length: Option<usize>) -> Result<Parts<'a>, Error> {
        Ok(Parts { cells: self, is_row: false, is_empty: true })
    }

    fn serialize_struct(self, _name: &'static str, _length: usize) -> Result<Parts<'a>, Error> {
        let is_row = !self.is_inside;
        Ok(Parts { cells: self, is_row, is_empty: true })
    }

    fn serialize_bytes(self, _value: &[u8]) -> Result<(), Error> {
        no_cell("an array of bytes")
    }

    fn serialize_unit_struct(self, name: &'static str) -> Result<(), Error> {
        no_cell(name)
    }

    fn serialize_newtype_variant<T: ?Sized + Serialize>(
        self,
        name: &'static str,
        _index: u32,
        _variant: &'static str,
        _value: &T,
    ) -> Result<(), Error> {
        no_cell(name)
    }

    fn serialize_tuple(self, _length: usize) -> Result<Self::SerializeTuple, Error> {
        no_cell("a tuple")
    }

    fn serialize_tuple_struct(
        self,
        name: &'static str,
        _length: usize,
    ) -> Result<Self::SerializeTupleStruct, Error> {
        no_cell(name)
    }

    fn serialize_tuple_variant(
        self,
        name: &'static str,
        _index: u32,
        _variant: &'static str,
        _length: usize,
    ) -> Result<Self::SerializeTupleVariant, Error> {
        no_cell(name)
    }

    fn serialize_struct_variant(
        self,
        name: &'static str,
        _index: u32,
        _variant: &'static str,
        _length: usize,
    ) -> Result<Self::SerializeStructVariant, Error> {
        no_cell(name)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[derive(Serialize)]
    struct Inner {
        packets: u64,
        is_full: bool,
    }

    #[derive(Serialize)]
    struct Row {
        name: &'static str,
        backends: Vec<u32>,
        affinity: Option<u32>,
        drops: BTreeMap<&'static str, u64>,
        inner: Option<Inner>,
    }

    #[test]
    fn a_table_has_the_fields_as_columns_and_shows_what_they_hold() {
        let drops = BTreeMap::from([("no_endpoint", 3), ("ttl", 1)]);
        let inner = Some(Inner { packets: 7, is_full: true });
        let rows = [
            Row { name: "a/long-name", backends: vec![1, 2], affinity: None, drops, inner },
            Row {
                name: "b",
                backends: Vec::new(),
                affinity: Some(9),
                drops: BTreeMap::new(),
                inner: None,
            },
        ];
        let text = |rows: &[Row]| {
            let mut text = Vec::new();
            write(&mut text, || rows.iter()).unwrap();
            String::from_utf8(text).unwrap()
        };
        let expected = "\
            NAME         BACKENDS  AFFINITY  DROPS                INNER\n\
            a/long-name  1,2       -         no_endpoint=3,ttl=1  packets=7,is_full=true\n\
            b            -         9         -                    -\n";
        assert_eq!(text(&rows), expected);
        assert_eq!(text(&[]), "none\n");
    }
}
