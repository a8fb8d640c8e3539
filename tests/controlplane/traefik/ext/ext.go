// Package ext adds nothing.
package ext

// HTTP is embedded in Traefik's HTTP configuration.
type HTTP struct{}

// Router is embedded in each of its routers.
type Router struct{}
