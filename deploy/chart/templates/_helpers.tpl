{{- define "multilora.labels" -}}
app.kubernetes.io/name: multilora
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end }}

{{- define "multilora.meta" -}}
name: {{ .root.Release.Name }}-{{ .part }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "multilora.labels" . | nindent 2 }}
  app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
  app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- end }}

{{- define "multilora.image" -}}
{{- $tag := .root.Values.image.tag | default .root.Chart.AppVersion -}}
{{ .root.Values.image.registry }}/{{ .name }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ $tag }}{{ .suffix }}{{ end }}
{{- end }}

{{/* Of every pod: Pod Security "restricted", no token of the API server, spread over nodes and zones. */}}
{{- define "multilora.pod" -}}
serviceAccountName: {{ .root.Release.Name }}-{{ .part }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: { type: RuntimeDefault }
topologySpreadConstraints:
  {{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "multilora.labels" $ | nindent 8 }}
  {{- end }}
{{- end }}

{{/* Of every container. A service that cannot start says why in its last line, which becomes the pod's message. */}}
{{- define "multilora.container" -}}
imagePullPolicy: {{ .Values.image.pullPolicy }}
terminationMessagePolicy: FallbackToLogsOnError
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: { drop: [ALL] }
{{- end }}

{{/* `--flag=value` of a map of flags: once for each of a list; `--flag` or `--no-flag` of true and false. */}}
{{- define "multilora.flags" -}}
{{- range $flag, $value := . }}
{{- if kindIs "bool" $value }}
- --{{ $value | ternary "" "no-" }}{{ $flag }}
{{- else }}
{{- range kindIs "slice" $value | ternary $value (list $value) }}
- --{{ $flag }}={{ if and (kindIs "float64" .) (eq (floor .) .) }}{{ int64 . }}{{ else }}{{ . }}{{ end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* What would end pods, or keep replicas from the store. */}}
{{- define "multilora.checkSecurity" -}}
{{- if not (or .insecure .tokensSecret .clientCaSecret) }}
{{- fail "anybody could call: give security.tokensSecret or security.clientCaSecret, or say security.insecure" }}
{{- end }}
{{- if and .clientCaSecret (not .tlsSecret) }}
{{- fail "security.clientCaSecret needs TLS: give security.tlsSecret" }}
{{- end }}
{{- if and .clientCaSecret (not .storeCertSecret) }}
{{- fail "security.clientCaSecret asks every client for a certificate: give security.storeCertSecret, which replicas show the store" }}
{{- end }}
{{- if and .tlsSecret (not .storeCaSecret) }}
{{- fail "security.tlsSecret is of the store too: give security.storeCaSecret, by which replicas know it" }}
{{- end }}
{{- if and .tokensSecret (not (or .storeTokenSecret .storeCertSecret)) }}
{{- fail "security.tokensSecret asks replicas as well: give security.storeTokenSecret, which they show the store" }}
{{- end }}
{{- end }}

{{- define "multilora.securityFlags" -}}
{{- with .Values.security }}
{{- if .tlsSecret }}
- --tls-cert=/secrets/tls/tls.crt
- --tls-key=/secrets/tls/tls.key
{{- end }}
{{- if .clientCaSecret }}
- --tls-client-ca=/secrets/client-ca/ca.crt
{{- end }}
{{- if .tokensSecret }}
- --tokens=/secrets/tokens/tokens
{{- end }}
{{- end }}
{{- end }}

{{- define "multilora.insecure" -}}
{{- if .Values.security.insecure }}
env:
  - { name: MULTILORA_INSECURE, value: "1" }
{{- end }}
{{- end }}

{{/* Secrets as files, which are renewed while the pod runs. */}}
{{- define "multilora.secretMounts" -}}
{{- range $name, $secret := . }}
{{- if $secret }}
- { name: {{ $name }}, mountPath: /secrets/{{ $name }}, readOnly: true }
{{- end }}
{{- end }}
{{- end }}

{{- define "multilora.secretVolumes" -}}
{{- range $name, $secret := . }}
{{- if $secret }}
- name: {{ $name }}
  secret: { secretName: {{ $secret }}, defaultMode: 0440 }
{{- end }}
{{- end }}
{{- end }}
