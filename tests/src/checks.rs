//! Checks of the repository itself: that its pages say what its sources do.

mod contract;
