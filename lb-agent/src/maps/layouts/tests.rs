use lb_common::abi::{
    conversion::{BEFORE, KEY, OWN},
    layout::MAPS,
};

use super::{
    convert::{Conversion, Mismatch, words},
    description::{Description, Leaf, Side},
};

/// The description of a map of these keys and values: each field is a path, the number of its
/// elements, their size, `n` for numbers or `b` for bytes, and perhaps `?` for a default.
fn description(version: u32, key: &[&str], value: &[&str]) -> Description {
    let map = "MAP".to_owned();
    Description { map, version, key: side(key), value: side(value) }
}

fn side(fields: &[&str]) -> Side {
    let mut offset = 0;
    let leaves = fields.iter().map(|field| {
        let words: Vec<&str> = field.split(' ').collect();
        let (count, size) = (words[1].parse().expect("a count"), words[2].parse().expect("a size"));
        let leaf = Leaf {
            path: words[0].to_owned(),
            offset,
            size,
            count,
            is_number: words[3].starts_with('n'),
            defaults_to_zero: words[3].ends_with('?'),
        };
        offset += size * count;
        leaf
    });
    let leaves = leaves.collect();
    Side { size: offset, leaves }
}

fn mismatch(from: &[&str], to: &[&str]) -> String {
    let (from, to) = (description(1, &["k 1 4 n"], from), description(2, &["k 1 4 n"], to));
    Conversion::new(&from, &to).expect_err("there is no conversion").to_string()
}

#[test]
fn the_text_of_every_description_is_read_as_it_was_written() {
    for map in MAPS {
        let description = Description::of(map);
        assert_eq!(Description::parse(&description.to_string()), Some(description));
        assert!(Description::of(map).to_string().len() < 16_000, "{}", map.name);
    }
}

#[test]
fn a_text_that_is_not_a_description_is_none() {
    let text = Description::own("FRAGMENTS4").expect("a map").to_string();
    for broken in [
        String::new(),
        text.replace("map ", "mop "),
        text.replace("value ", "walue "),
        text.replacen("source 0", "source 4000", 1),
        text.replace("bytes", "letters"),
    ] {
        assert_eq!(Description::parse(&broken), None, "{broken}");
    }
}

#[test]
fn a_map_converts_to_its_own_layout_unchanged() {
    for map in MAPS {
        let own = Description::of(map);
        let conversion = Conversion::new(&own, &own).expect("the same fields");
        assert!(conversion.keeps_keys(), "{}", map.name);
        let bytes: Vec<u8> = (0..own.value.size).map(|index| index as u8).collect();
        assert_eq!(conversion.value(&bytes, false), bytes, "{}", map.name);
    }
}

#[test]
fn fields_that_move_widen_and_shrink_keep_their_values() {
    let one =
        description(1, &["a 1 2 n", "b 1 4 b"], &["c 1 2 n", "d 1 8 n", "e 3 1 n", "z 1 1 n?"]);
    let two = description(2, &["b 1 4 b", "a 1 4 n"], &["e 3 2 n", "d 1 8 n", "c 1 4 n"]);
    let there = Conversion::new(&one, &two).expect("the same fields");
    let back = Conversion::new(&two, &one).expect("the same fields");
    let (key, value) = ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 0]);
    let two_key = there.key(&key).expect("it can be said");
    assert_eq!(two_key, [3, 4, 5, 6, 1, 2, 0, 0]);
    let two_value = there.value(&value, false);
    assert_eq!(two_value, [11, 0, 12, 0, 13, 0, 3, 4, 5, 6, 7, 8, 9, 10, 1, 2, 0, 0]);
    assert_eq!(back.key(&two_key).expect("it can be said"), key);
    assert_eq!(back.value(&two_value, false), value);
}

#[test]
fn a_key_with_a_field_that_the_other_layout_lacks_is_left_out_unless_it_is_zero() {
    let one = description(1, &["a 1 2 n"], &["v 1 1 n"]);
    let two = description(2, &["zone 1 2 n?", "a 1 2 n"], &["v 1 1 n"]);
    let there = Conversion::new(&one, &two).expect("the zone has a default");
    let back = Conversion::new(&two, &one).expect("the zone has a default");
    assert_eq!(there.key(&[7, 8]), Some(vec![0, 0, 7, 8]));
    assert_eq!(back.key(&[0, 0, 7, 8]), Some(vec![7, 8]));
    assert_eq!(back.key(&[1, 0, 7, 8]), None);
}

#[test]
fn the_values_of_all_cpus_are_converted() {
    let one = description(1, &["k 1 4 n"], &["a 1 4 n", "b 1 8 n"]);
    let two = description(2, &["k 1 4 n"], &["b 1 8 n", "a 1 8 n"]);
    let conversion = Conversion::new(&one, &two).expect("the same fields");
    let cpu = |first: u8| [first, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, first, 0, 0, 0, 0];
    let both = conversion.value(&[cpu(1), cpu(2)].concat(), true);
    assert_eq!(both.len(), 32);
    assert_eq!((both[0], both[7], both[8], both[23], both[24]), (9, 1, 1, 2, 2));
}

#[test]
fn what_cannot_be_converted_is_named() {
    let text = mismatch(&["a 1 4 n"], &["a 1 4 n", "b 1 4 n"]);
    assert_eq!(text, "field b of the value is in version 2 only, and has no default");
    let text = mismatch(&["a 1 4 n", "b 1 4 n"], &["a 1 4 n"]);
    assert_eq!(text, "field b of the value is in version 1 only, and has no default");
    let text = mismatch(&["a 1 4 n"], &["a 1 4 b"]);
    assert_eq!(
        text,
        "field a of the value is of another kind: 1*4 number in version 1, 1*4 bytes in version 2"
    );
    for (from, to) in [("a 1 4 b", "a 1 8 b"), ("a 4 1 n", "a 8 1 n")] {
        assert!(mismatch(&[from], &[to]).contains("of another kind"), "{from} to {to}");
    }
}

#[test]
fn programs_get_the_steps_of_every_map_that_they_convert() {
    for name in ["FRAGMENTS4", "FRAGMENTS6", "DATAGRAM_PEERS"] {
        let own = Description::own(name).expect("a map");
        let program = words(1, &own, &own).expect("the same layout");
        let copied = |steps: &[u32]| steps.iter().map(|step| step >> 16).sum::<u32>();
        let (key, value) = (copied(&program[KEY..OWN]), copied(&program[OWN..BEFORE]));
        assert_eq!((key, value), (own.key.size as u32, own.value.size as u32), "{name}");
        assert_eq!(program[OWN..BEFORE], program[BEFORE..], "{name}");
    }
    let own = Description::own("FRAGMENTS4").expect("a map");
    let mut other = own.clone();
    other.value.leaves.retain(|leaf| leaf.path != "last_seen");
    let error = words(1, &other, &own).expect_err("no time");
    assert!(matches!(error, Mismatch::Missing { .. }), "{error}");
}
