//! Conversion of entries by the names of fields.
//!
//! A field keeps its value. A number keeps its low bytes in a smaller field, in every map alike, so
//! that numbers that are compared stay comparable. A field that one side lacks is zero where its
//! description says that it may be; else there is no conversion.

use lb_common::abi::conversion::{
    BEFORE, ConversionWords, KEY, LARGEST_KEY, LARGEST_VALUE, MOVED, OWN, WORDS,
};

use super::description::{Description, Leaf, Side};

/// How entries with one layout become entries with another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conversion {
    key: Steps,
    value: Steps,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Steps {
    from_size: usize,
    to_size: usize,
    copies: Vec<Copied>,
    /// What the other layout has no field for.
    dropped: Vec<(usize, usize)>,
}

/// Bytes that are copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copied {
    /// The offset in the entry that is converted.
    pub from: usize,
    /// The offset in the result.
    pub to: usize,
    /// The number of bytes.
    pub size: usize,
}

/// Why a field cannot be converted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// A field is missing.
    #[error("field {field} of the {side} is in version {has} only, and has no default")]
    Missing {
        /// Key or value.
        side: &'static str,
        /// Its path.
        field: String,
        /// The version that has it.
        has: u32,
    },
    /// A field is of another kind.
    #[error(
        "field {field} of the {side} is of another kind: {from} in version {from_version}, {to} in \
         version {to_version}"
    )]
    Kind {
        /// Key or value.
        side: &'static str,
        /// Its path.
        field: String,
        /// The kind that is converted.
        from: String,
        /// The version that has it.
        from_version: u32,
        /// The kind that it should become.
        to: String,
        /// The version that has it.
        to_version: u32,
    },
    /// The bits of a key are compared in their order.
    #[error("the keys are prefixes, whose bits have another order")]
    Prefix,
    /// The description of a layout is not there.
    #[error("no description of version {version} is in the kernel")]
    Unknown {
        /// The version.
        version: u32,
    },
    /// Two layouts have one version.
    #[error("version {version} has other fields than in this build")]
    SameVersion {
        /// The version.
        version: u32,
    },
    /// The programs cannot convert it.
    #[error("the programs cannot convert it: {0}")]
    Program(#[from] PlanError),
}

impl Conversion {
    /// The conversion from one layout to another.
    ///
    /// # Errors
    /// [`Mismatch`], with the first field for which there is none.
    pub fn new(from: &Description, to: &Description) -> Result<Self, Mismatch> {
        let versions = (from.version, to.version);
        Ok(Self {
            key: Steps::new("key", &from.key, &to.key, versions)?,
            value: Steps::new("value", &from.value, &to.value, versions)?,
        })
    }

    /// Whether the key stays as it is.
    pub fn keeps_keys(&self) -> bool {
        let whole = Copied { from: 0, to: 0, size: self.key.from_size };
        self.key.from_size == self.key.to_size && self.key.copies == [whole]
    }

    /// The converted key; `None` if it says what the other layout cannot.
    pub fn key(&self, key: &[u8]) -> Option<Vec<u8>> {
        let is_empty = |(start, end): &(usize, usize)| {
            key.get(*start..*end).is_some_and(|bytes| bytes.iter().all(|byte| *byte == 0))
        };
        self.key.dropped.iter().all(is_empty).then(|| self.key.apply(key))
    }

    /// The converted value. A longer one is taken for those of several CPUs.
    pub fn value(&self, value: &[u8], is_per_cpu: bool) -> Vec<u8> {
        if !is_per_cpu {
            return self.value.apply(value);
        }
        let (from, to) = (self.value.from_size, self.value.to_size.next_multiple_of(8));
        let mut all = Vec::new();
        for one in value.chunks_exact(from.next_multiple_of(8)) {
            let mut converted = self.value.apply(&one[..from.min(one.len())]);
            converted.resize(to, 0);
            all.extend(converted);
        }
        all
    }
}

impl Steps {
    fn new(
        what: &'static str,
        from: &Side,
        to: &Side,
        (from_version, to_version): (u32, u32),
    ) -> Result<Self, Mismatch> {
        let missing = |leaf: &Leaf, has| {
            if leaf.defaults_to_zero {
                return Ok(());
            }
            Err(Mismatch::Missing { side: what, field: leaf.path.clone(), has })
        };
        let mut copies = Vec::new();
        for leaf in &to.leaves {
            let Some(source) = from.leaves.iter().find(|source| source.path == leaf.path) else {
                missing(leaf, to_version)?;
                continue;
            };
            let is_convertible = leaf.is_number == source.is_number
                && leaf.count == source.count
                && (leaf.is_number || leaf.size == source.size);
            if !is_convertible {
                return Err(Mismatch::Kind {
                    side: what,
                    field: leaf.path.clone(),
                    from: source.kind(),
                    from_version,
                    to: leaf.kind(),
                    to_version,
                });
            }
            copies.extend((0..leaf.count).map(|index| Copied {
                from: source.offset + index * source.size,
                to: leaf.offset + index * leaf.size,
                // The low bytes of a number are its first ones on every machine that lb runs on.
                size: leaf.size.min(source.size),
            }));
        }
        let mut dropped = Vec::new();
        for leaf in &from.leaves {
            if !to.leaves.iter().any(|kept| kept.path == leaf.path) {
                missing(leaf, from_version)?;
                dropped.push((leaf.offset, leaf.end()));
            }
        }
        Ok(Self { from_size: from.size, to_size: to.size, copies: merged(copies), dropped })
    }

    fn apply(&self, from: &[u8]) -> Vec<u8> {
        let mut to = vec![0; self.to_size];
        for copy in &self.copies {
            let source = from.get(copy.from..copy.from + copy.size);
            let target = to.get_mut(copy.to..copy.to + copy.size);
            if let (Some(source), Some(target)) = (source, target) {
                target.copy_from_slice(source);
            }
        }
        to
    }
}

/// The same copies, with neighbours as one.
fn merged(mut copies: Vec<Copied>) -> Vec<Copied> {
    copies.sort_by_key(|copy| copy.to);
    let mut merged: Vec<Copied> = Vec::new();
    for copy in copies {
        match merged.last_mut() {
            Some(last) if last.from + last.size == copy.from && last.to + last.size == copy.to => {
                last.size += copy.size;
            }
            _ => merged.push(copy),
        }
    }
    merged
}

/// The programs have no room for a conversion.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// An entry is too large.
    #[error("an entry is too large")]
    Size,
    /// There are too many steps.
    #[error("it takes too many steps")]
    Steps,
    /// A field that programs change in place is missing or too small.
    #[error("a field that programs change in place is missing or small")]
    Field,
}

/// The conversion of a map that programs write, between the layout before and that of this release.
///
/// # Errors
/// [`Mismatch`] if there is none in both directions, or the programs have no room for it.
pub fn words(
    moved: u32,
    before: &Description,
    own: &Description,
) -> Result<ConversionWords, Mismatch> {
    let forth = Conversion::new(before, own)?;
    let back = Conversion::new(own, before)?;
    if before.key.size > LARGEST_KEY || before.value.size > LARGEST_VALUE {
        return Err(PlanError::Size.into());
    }
    let mut words = [0; WORDS];
    words[MOVED] = moved;
    // Programs of sockets convert on their stack, where keys are aligned to 4 bytes.
    let largest = if own.map == "DATAGRAM_PEERS" { 4 } else { 8 };
    fill(&mut words[KEY..OWN], &back.key.copies, largest)?;
    fill(&mut words[OWN..BEFORE], &forth.value.copies, largest)?;
    fill(&mut words[BEFORE..], &back.value.copies, largest)?;
    Ok(words)
}

/// Writes the copies as steps of at most `largest` bytes.
fn fill(words: &mut [u32], copies: &[Copied], largest: usize) -> Result<(), PlanError> {
    let mut places = words.iter_mut();
    for copy in copies {
        let Copied { mut from, mut to, mut size } = *copy;
        while size > 0 {
            let fits = |step: &usize| {
                *step <= size.min(largest) && from.is_multiple_of(*step) && to.is_multiple_of(*step)
            };
            let step = [8, 4, 2, 1].into_iter().find(fits).unwrap_or(1);
            let place = places.next().ok_or(PlanError::Steps)?;
            let (first, second) = (u8::try_from(from), u8::try_from(to));
            let (Ok(first), Ok(second)) = (first, second) else { return Err(PlanError::Size) };
            *place = u32::from(first) | u32::from(second) << 8 | (step as u32) << 16;
            (from, to, size) = (from + step, to + step, size - step);
        }
    }
    Ok(())
}
