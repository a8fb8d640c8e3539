//! Cycles in a small graph.

use std::collections::VecDeque;

/// The shortest cycle of each group of nodes that reach each other, as a list of edges.
pub(super) fn shortest(nodes: usize, arrows: &[(usize, usize)]) -> Vec<Vec<(usize, usize)>> {
    let mut next = vec![Vec::new(); nodes];
    for &(from, to) in arrows {
        next[from].push(to);
    }
    let mut found: Vec<Vec<(usize, usize)>> = Vec::new();
    let mut is_done = vec![false; nodes];
    for start in 0..nodes {
        if is_done[start] {
            continue;
        }
        let group: Vec<usize> = (start..nodes)
            .filter(|&node| {
                path(&next, start, node).is_some() && path(&next, node, start).is_some()
            })
            .collect();
        let cycles = group.iter().filter_map(|&node| path(&next, node, node));
        found.extend(cycles.min_by_key(Vec::len));
        group.into_iter().for_each(|node| is_done[node] = true);
    }
    found
}

/// A shortest path of at least one edge.
fn path(next: &[Vec<usize>], from: usize, to: usize) -> Option<Vec<(usize, usize)>> {
    let mut came_from = vec![None; next.len()];
    let mut queue = VecDeque::from([from]);
    while let Some(node) = queue.pop_front() {
        for &after in &next[node] {
            if came_from[after].is_none() {
                came_from[after] = Some(node);
                queue.push_back(after);
            }
        }
    }
    let mut arrows = Vec::new();
    let mut node = to;
    loop {
        let before = came_from[node]?;
        arrows.push((before, node));
        node = before;
        if node == from {
            arrows.reverse();
            return Some(arrows);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_group_shows_its_shortest_circle() {
        assert!(shortest(4, &[(0, 1), (1, 2), (0, 2), (2, 3)]).is_empty());
        assert_eq!(shortest(3, &[(0, 1), (1, 2), (2, 1)]), [[(1, 2), (2, 1)]]);
        let two = shortest(5, &[(0, 1), (1, 2), (2, 0), (1, 0), (2, 3), (3, 4), (4, 3)]);
        assert_eq!(two, [[(0, 1), (1, 0)], [(3, 4), (4, 3)]]);
    }
}
