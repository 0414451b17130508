// SPDX-License-Identifier: Apache-2.0

package tools

import (
	"fmt"
	"io"

	"k8s.io/cli-runtime/pkg/genericiooptions"
	kubectl "k8s.io/kubectl/pkg/cmd"
)

// Kedge's own commands complete through urfave/cli's --generate-bash-completion; kubectl completes through cobra's script, which
// calls the kubectl of the PATH. `kedge kubectl` hands over to the same functions.
const (
	bashScript = `
_kedge() {
  local cur=${COMP_WORDS[COMP_CWORD]}
  if [ "${COMP_WORDS[1]}" = kubectl ] && [ "$COMP_CWORD" -gt 1 ]; then
    COMP_WORDS=("${COMP_WORDS[@]:1}"); COMP_CWORD=$((COMP_CWORD - 1))
    COMP_LINE=${COMP_LINE#* }; COMP_POINT=${#COMP_LINE}
    __start_kubectl
    return
  fi
  COMPREPLY=($(compgen -W "$("${COMP_WORDS[@]:0:COMP_CWORD}" ${cur:+"$cur"} --generate-bash-completion 2>/dev/null)" -- "$cur"))
}
complete -o default -F _kedge kedge
alias k=kubectl
complete -o default -F __start_kubectl k
`
	zshScript = `
_kedge() {
  if [[ ${words[2]} == kubectl && $CURRENT -gt 2 ]]; then
    shift words; (( CURRENT -= 1 ))
    _kubectl
    return
  fi
  local -a opts
  opts=("${(@f)$(${words[@]:0:#words[@]-1} ${words[CURRENT]} --generate-bash-completion 2>/dev/null)}")
  _describe 'values' opts
}
compdef _kedge kedge
alias k=kubectl
compdef k=kubectl
`
	fishScript = `
complete -c kedge -f -a '(set -l t (commandline -opc); $t (commandline -ct) --generate-bash-completion 2>/dev/null)'
alias k=kubectl
complete -c k -w kubectl
`
)

func completion(out io.Writer, shell string) error {
	own, ok := map[string]string{"bash": bashScript, "zsh": zshScript, "fish": fishScript}[shell]
	if !ok {
		return fmt.Errorf("for which shell? kedge completion bash|zsh|fish; for this session: source <(kedge completion bash)")
	}
	cmd := kubectl.NewKubectlCommand(kubectl.KubectlOptions{IOStreams: genericiooptions.IOStreams{In: nil, Out: out, ErrOut: out}, Arguments: []string{"kubectl"}})
	cmd.SetArgs([]string{"completion", shell})
	cmd.SetOut(out)
	if err := cmd.Execute(); err != nil {
		return err
	}
	_, err := io.WriteString(out, own)
	return err
}
