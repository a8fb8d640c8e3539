//! The inputs of the repository: `corpus/TARGET/FILE`. A file whose name ends in `.hex` is bytes in
//! hexadecimal, with comments from `#` to the end of a line; any other is the input itself.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// An input, and the name of its file.
#[derive(Clone, Debug)]
pub struct Input {
    /// The name.
    pub name: String,
    /// The bytes.
    pub bytes: Vec<u8>,
}

/// The inputs of a target, in the order of their names.
///
/// # Errors
/// If a file cannot be read or is not hexadecimal.
pub fn read(target: &str) -> io::Result<Vec<Input>> {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    let mut inputs = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let bytes = match name.ends_with(".hex") {
            true => from_hex(&fs::read_to_string(&path)?).ok_or_else(|| {
                let problem = format!("{} is not pairs of hexadecimal digits", path.display());
                io::Error::new(io::ErrorKind::InvalidData, problem)
            })?,
            false => fs::read(&path)?,
        };
        inputs.push(Input { name, bytes });
    }
    inputs.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(inputs)
}

/// Writes the inputs of a target into a directory, each as it is given to the target.
///
/// # Errors
/// If a file cannot be read or written.
pub fn write(target: &str, directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    for Input { name, bytes } in read(target)? {
        fs::write(directory.join(name), bytes)?;
    }
    Ok(())
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default());
    let digits: String = lines.flat_map(str::split_whitespace).collect();
    if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    let pair = |at: usize| u8::from_str_radix(digits.get(at..at + 2)?, 16).ok();
    (0..digits.len()).step_by(2).map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_has_pairs_of_digits_and_comments() {
        let rows: [(&str, Option<&[u8]>); 6] = [
            ("", Some(&[])),
            ("01 fF\n# all: 33\n a0b1 # end", Some(&[1, 0xff, 0xa0, 0xb1])),
            ("0", None),
            ("0g", None),
            ("+1", None),
            ("é", None),
        ];
        for (text, expected) in rows {
            assert_eq!(from_hex(text).as_deref(), expected, "{text:?}");
        }
    }
}
