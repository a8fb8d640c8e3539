//! The paths in one module's items. A single name is not counted, because a name of another module
//! must be imported, and the import is a path.

use std::collections::BTreeMap;

use proc_macro2::{TokenStream, TokenTree};
use syn::visit::{self, Visit};
use syn::{
    Attribute, ImplItem, Item, ItemUse, Macro, Meta, Path, TraitItem, UseTree, VisRestricted,
};

use super::Written;

pub(super) struct Paths {
    /// The name of the package's library, if this is its program.
    library: Option<String>,
    pub(super) imports: BTreeMap<String, Vec<String>>,
    pub(super) written: Vec<Written>,
}

impl Paths {
    pub(super) fn new(library: Option<String>) -> Self {
        Self { library, imports: BTreeMap::new(), written: Vec::new() }
    }

    fn add(&mut self, segments: Vec<String>, line: usize) {
        self.written.push(Written { segments, line });
    }

    fn use_tree(&mut self, tree: &UseTree, prefix: &[String]) {
        let extended = |name: String| {
            let mut path = prefix.to_vec();
            path.push(name);
            path
        };
        match tree {
            UseTree::Path(path) => self.use_tree(&path.tree, &extended(path.ident.to_string())),
            UseTree::Group(group) => {
                group.items.iter().for_each(|tree| self.use_tree(tree, prefix));
            }
            UseTree::Glob(glob) => {
                self.add(prefix.to_vec(), glob.star_token.spans[0].start().line);
            }
            UseTree::Name(name) => {
                let line = name.ident.span().start().line;
                let path = extended(name.ident.to_string());
                self.import(path, None, line);
            }
            UseTree::Rename(rename) => {
                let line = rename.ident.span().start().line;
                let path = extended(rename.ident.to_string());
                self.import(path, Some(rename.rename.to_string()), line);
            }
        }
    }

    fn import(&mut self, mut path: Vec<String>, name: Option<String>, line: usize) {
        // `use a::b::{self}` imports `b`.
        if path.len() > 1 && path.last().is_some_and(|last| last == "self") {
            path.pop();
        }
        let name = name.or_else(|| path.last().cloned()).unwrap_or_default();
        // `use x;` of a crate stands for itself.
        if path.len() > 1 || path.first() != Some(&name) {
            self.imports.insert(name, path.clone());
        }
        self.add(path, line);
    }

    /// Tokens of a macro that look like a path.
    fn tokens(&mut self, tokens: TokenStream) {
        let mut path: Vec<String> = Vec::new();
        let mut line = 0;
        let mut colons = 0;
        for token in tokens {
            match token {
                TokenTree::Ident(ident) => {
                    if colons != 2 {
                        self.flush(&mut path, line);
                    }
                    if path.is_empty() {
                        line = ident.span().start().line;
                    }
                    path.push(ident.to_string());
                    colons = 0;
                }
                TokenTree::Punct(punct) if punct.as_char() == ':' => colons += 1,
                TokenTree::Group(group) => {
                    self.flush(&mut path, line);
                    colons = 0;
                    self.tokens(group.stream());
                }
                TokenTree::Punct(_) | TokenTree::Literal(_) => {
                    self.flush(&mut path, line);
                    colons = 0;
                }
            }
        }
        self.flush(&mut path, line);
    }

    fn flush(&mut self, path: &mut Vec<String>, line: usize) {
        let path = std::mem::take(path);
        if path.len() > 1 {
            self.add(self.named(path), line);
        }
    }

    /// With the library's name replaced: beside it, the root of the crate is the library's.
    fn named(&self, mut path: Vec<String>) -> Vec<String> {
        if self.library.is_some() && path.first() == self.library.as_ref() {
            // One up from `main`, and down again.
            path[0] = "super".to_owned();
        }
        path
    }
}

impl<'ast> Visit<'ast> for Paths {
    fn visit_item(&mut self, item: &'ast Item) {
        if !is_test_item(item) {
            visit::visit_item(self, item);
        }
    }

    fn visit_impl_item(&mut self, item: &'ast ImplItem) {
        if !is_test_member(item) {
            visit::visit_impl_item(self, item);
        }
    }

    fn visit_trait_item(&mut self, item: &'ast TraitItem) {
        match item {
            TraitItem::Fn(function) if is_for_tests(&function.attrs) => {}
            _ => visit::visit_trait_item(self, item),
        }
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        let mut found = Self::new(None);
        found.use_tree(&item.tree, &[]);
        for (name, path) in found.imports {
            let path = self.named(path);
            self.imports.insert(name, path);
        }
        for Written { segments, line } in found.written {
            let segments = self.named(segments);
            self.add(segments, line);
        }
    }

    fn visit_path(&mut self, path: &'ast Path) {
        if let Some(first) = path.segments.first()
            && path.segments.len() > 1
        {
            let segments = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
            let line = first.ident.span().start().line;
            self.add(self.named(segments), line);
        }
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, mac: &'ast Macro) {
        self.tokens(mac.tokens.clone());
        visit::visit_macro(self, mac);
    }

    fn visit_attribute(&mut self, attribute: &'ast Attribute) {
        match &attribute.meta {
            Meta::List(list) => self.tokens(list.tokens.clone()),
            Meta::NameValue(value) if !value.path.is_ident("doc") => {
                self.visit_expr(&value.value);
            }
            _ => {}
        }
    }

    /// A path in a visibility is not a use.
    fn visit_vis_restricted(&mut self, _: &'ast VisRestricted) {}
}

/// Whether these are the attributes of test code.
pub(super) fn is_for_tests(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| match &attribute.meta {
        Meta::List(list) if list.path.is_ident("cfg") => {
            let words = list.tokens.to_string();
            let has = |word: &str| words.split(|c: char| !c.is_alphanumeric()).any(|w| w == word);
            has("test") && !has("not")
        }
        meta => meta.path().is_ident("test"),
    })
}

/// Whether an item is test code.
pub(in crate::check) fn is_test_item(item: &Item) -> bool {
    is_for_tests(match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => return false,
    })
}

/// Whether a part of an `impl` is test code.
pub(in crate::check) fn is_test_member(item: &ImplItem) -> bool {
    is_for_tests(match item {
        ImplItem::Const(item) => &item.attrs,
        ImplItem::Fn(item) => &item.attrs,
        ImplItem::Type(item) => &item.attrs,
        _ => return false,
    })
}
