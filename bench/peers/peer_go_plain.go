//go:build !modules

// Without golang.org/x: its figures are left out.
package main

func groupModules() {}
func flowModules()  {}

var handModules []func() hand
