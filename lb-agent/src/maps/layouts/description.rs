//! The layout of a map as text: the fields of its keys and values, with names, places, sizes and
//! kinds.
//!
//! Another release knows a layout from this text alone. Invariant: the text of a map and version
//! never changes.

use std::fmt::{self, Write as _};

use lb_common::abi::layout::{FORMER, Kind, MAPS, MapLayout, Type};

/// The layout of a map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// The name of the map.
    pub map: String,
    /// The version of the layout.
    pub version: u32,
    /// The keys.
    pub key: Side,
    /// The values.
    pub value: Side,
}

/// The layout of keys or values.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Side {
    /// In bytes.
    pub size: usize,
    /// The fields that have no fields themselves.
    pub leaves: Vec<Leaf>,
}

/// A field that has no fields itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// The names of the fields that lead to it, with dots in between.
    pub path: String,
    /// In bytes.
    pub offset: usize,
    /// The size of an element in bytes.
    pub size: usize,
    /// The number of elements.
    pub count: usize,
    /// Whether the elements are numbers in the byte order of the host.
    pub is_number: bool,
    /// Whether 0 is correct where the other layout has no such field.
    pub defaults_to_zero: bool,
}

/// The path of a key or value that has no fields.
const WHOLE: &str = "-";

impl Description {
    /// The layout that this release has for the map `name`.
    pub fn own(name: &str) -> Option<Self> {
        MAPS.iter().find(|map| map.name == name).map(Self::of)
    }

    /// The layout of a release that left no description of it.
    pub fn former(name: &str, version: u32) -> Option<Self> {
        let is_it = |map: &&MapLayout| map.name == name && map.version == version;
        FORMER.iter().find(is_it).map(Self::of)
    }

    /// The description of a layout.
    pub fn of(map: &MapLayout) -> Self {
        let (key, value) = (Side::of(map.key), Side::of(map.value));
        Self { map: map.name.to_owned(), version: map.version, key, value }
    }

    /// Reads the text that [`fmt::Display`] writes.
    pub fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let (map, version) = lines.next()?.strip_prefix("map ")?.split_once('@')?;
        let (map, version) = (map.to_owned(), version.parse().ok()?);
        let size = |line: Option<&str>, what: &str| line?.strip_prefix(what)?.trim().parse().ok();
        let mut key = Side { size: size(lines.next(), "key ")?, leaves: Vec::new() };
        let mut value = None::<Side>;
        for line in lines {
            if let Some(bytes) = size(Some(line), "value ") {
                value = Some(Side { size: bytes, leaves: Vec::new() });
                continue;
            }
            let side = value.as_mut().unwrap_or(&mut key);
            side.leaves.push(Leaf::parse(line)?);
        }
        let value = value?;
        let is_sound =
            |side: &Side| side.leaves.iter().all(|leaf| leaf.count > 0 && leaf.end() <= side.size);
        (is_sound(&key) && is_sound(&value)).then_some(Self { map, version, key, value })
    }
}

impl fmt::Display for Description {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(formatter, "map {}@{}", self.map, self.version)?;
        for (what, side) in [("key", &self.key), ("value", &self.value)] {
            writeln!(formatter, "{what} {}", side.size)?;
            side.leaves.iter().try_for_each(|leaf| writeln!(formatter, "{leaf}"))?;
        }
        Ok(())
    }
}

impl Side {
    fn of(of: &Type) -> Self {
        let mut leaves = Vec::new();
        flatten(of, "", 0, false, &mut leaves);
        Self { size: of.size, leaves }
    }
}

fn flatten(of: &Type, path: &str, offset: usize, defaults: bool, leaves: &mut Vec<Leaf>) {
    let joined = |name: &dyn fmt::Display| match path {
        "" => name.to_string(),
        path => format!("{path}.{name}"),
    };
    let leaf = |size, count, is_number| {
        let path = if path.is_empty() { WHOLE.to_owned() } else { path.to_owned() };
        Leaf { path, offset, size, count, is_number, defaults_to_zero: defaults }
    };
    match of.kind {
        Kind::Number => leaves.push(leaf(of.size, 1, true)),
        Kind::Bytes => leaves.push(leaf(of.size, 1, false)),
        Kind::Array(element) if matches!(element.kind, Kind::Number) => {
            leaves.push(leaf(element.size, of.size / element.size, true));
        }
        Kind::Array(element) => {
            for index in 0..of.size / element.size {
                let offset = offset + index * element.size;
                flatten(element, &joined(&index), offset, defaults, leaves);
            }
        }
        Kind::Struct(fields) => {
            for field in fields {
                let defaults = defaults || field.defaults_to_zero;
                let offset = offset + field.offset;
                flatten(field.of, &joined(&field.name), offset, defaults, leaves);
            }
        }
    }
}

impl Leaf {
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace();
        let path = words.next()?.to_owned();
        let offset = words.next()?.parse().ok()?;
        let (count, size) = words.next()?.split_once('*')?;
        let is_number = match words.next()? {
            "number" => true,
            "bytes" => false,
            _ => return None,
        };
        let defaults_to_zero = words.next() == Some("or-zero");
        let (count, size) = (count.parse().ok()?, size.parse().ok()?);
        Some(Self { path, offset, size, count, is_number, defaults_to_zero })
    }

    /// The offset behind it.
    pub fn end(&self) -> usize {
        self.size.saturating_mul(self.count).saturating_add(self.offset)
    }

    /// What it is, as the text says it.
    pub fn kind(&self) -> String {
        let kind = if self.is_number { "number" } else { "bytes" };
        format!("{}*{} {kind}", self.count, self.size)
    }
}

impl fmt::Display for Leaf {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {} {}", self.path, self.offset, self.kind())?;
        if self.defaults_to_zero { formatter.write_str(" or-zero") } else { Ok(()) }
    }
}

/// The name of a map's pin, and of its description.
pub fn pin_name(map: &str, version: u32) -> String {
    let mut name = map.to_owned();
    // A string takes text.
    let _ = write!(name, "@{version}");
    name
}

/// The version that this release has for the map `name`.
pub fn version(name: &str) -> u32 {
    MAPS.iter().find(|map| map.name == name).map_or(1, |map| map.version)
}
